import gzip
import hashlib
import os

import pytest
import torch

from infocapsgan.data import DataError, files, load, mnist
from infocapsgan.data.mnist import _read, read_idx


def idx(shape, values):
    header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    return header + bytes(values)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content))
    return path


def test_values_stand_in_row_order(tmp_path):
    path = write(tmp_path / "x.gz", idx((2, 1, 3), [0, 1, 2, 253, 254, 255]))
    assert read_idx(path).tolist() == [[[0, 1, 2]], [[253, 254, 255]]]


def test_a_set_of_four_files(tmp_path):
    contents = {
        "train-images": idx((2, 1, 2), [1, 2, 3, 4]),
        "train-labels": idx((2,), [7, 9]),
        "test-images": idx((1, 1, 2), [5, 6]),
        "test-labels": idx((1,), [3]),
    }
    made = []
    for name, content in contents.items():
        write(tmp_path / "small" / f"{name}.gz", content)
        made.append(files.File(f"{name}.gz", hashlib.sha256(content).hexdigest()))
    source = files.Source("small", "http://localhost:9/", tuple(made))
    train_images, train_labels, test_images, test_labels = _read(source, tmp_path)
    assert train_images.tolist() == [[[[1, 2]]], [[[3, 4]]]]
    assert train_labels.tolist() == [7, 9]
    assert test_images.tolist() == [[[[5, 6]]]]
    assert test_labels.tolist() == [3]
    assert train_images.dtype == torch.uint8
    assert train_labels.dtype == torch.int64


@pytest.mark.parametrize("missing", [1, 5])
def test_a_file_cut_short(tmp_path, missing):
    path = write(tmp_path / "x.gz", idx((2, 3), range(6))[:-missing])
    with pytest.raises(DataError, match=r"x\.gz has .* bytes of values where its header says \[2, 3\]"):
        read_idx(path)


def test_a_header_cut_short(tmp_path):
    path = write(tmp_path / "x.gz", idx((2, 3), range(6))[:8])
    with pytest.raises(DataError, match="header says"):
        read_idx(path)


def test_a_gz_stream_cut_short(tmp_path):
    path = write(tmp_path / "x.gz", idx((2, 3), range(6)))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"x\.gz is damaged"):
        read_idx(path)


def test_a_flipped_byte(tmp_path):
    path = write(tmp_path / "x.gz", idx((2, 3), range(6)))
    content = bytearray(path.read_bytes())
    content[10] = 0xFF  # the first byte of the packed values
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.gz is damaged"):
        read_idx(path)


def test_what_is_no_idx_file(tmp_path):
    with pytest.raises(DataError, match="begins with 00 00 0d 01"):
        read_idx(write(tmp_path / "x.gz", b"\x00\x00\x0d\x01"))


@pytest.mark.parametrize(
    ("name", "constant", "folder"),
    [("mnist", "MNIST", "MNIST"), ("fashion-mnist", "FASHION_MNIST", "FashionMNIST")],
)
def test_the_layout_of_torchvision_is_read(name, constant, folder, tmp_path, monkeypatch):
    source = getattr(mnist, constant)
    contents = [idx((2, 1, 2), [1, 2, 3, 4]), idx((2,), [7, 9]), idx((1, 1, 2), [5, 6]), idx((1,), [3])]
    files_there = tmp_path / folder / "raw"
    files_there.mkdir(parents=True)
    known = []
    for file, content in zip(source.files, contents, strict=True):
        (files_there / file.name.removesuffix(".gz")).write_bytes(content)
        known.append(file._replace(checksum=hashlib.sha256(content).hexdigest()))
    monkeypatch.setattr(mnist, constant, source._replace(files=tuple(known)))
    dataset = load(name, tmp_path)
    assert dataset.train_images.tolist() == [[[[1, 2]]], [[[3, 4]]]]
    assert dataset.test_labels.tolist() == [3]
    (files_there / "t10k-labels-idx1-ubyte").write_bytes(idx((1,), [4]))
    with pytest.raises(DataError, match=f"{folder}/raw/t10k-labels-idx1-ubyte does not have the expected"):
        load(name, tmp_path)


needs_mnist = pytest.mark.skipif(
    not os.path.isdir(os.path.join(os.environ.get("INFOCAPSGAN_DATA", ""), "mnist")),
    reason="$INFOCAPSGAN_DATA with mnist/ is not there",
)


@needs_mnist
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_whole_set(name):
    dataset = load(name)
    assert dataset.train_images.shape == (60000, 1, 28, 28)
    assert dataset.test_images.shape == (10000, 1, 28, 28)
    assert dataset.test_labels.bincount().min() > 800
    assert dataset.train_labels.max() == 9
