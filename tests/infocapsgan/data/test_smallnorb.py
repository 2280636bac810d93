import gzip
import hashlib

import numpy as np
import pytest
import torch

from infocapsgan.data import DataError, files, load, smallnorb
from infocapsgan.data.smallnorb import BYTES, INTEGERS, read_matrix
from infocapsgan.engine.rng import ShardedGenerator


def matrix(kind, values):
    shape = list(values.shape) + [1] * (3 - values.ndim)
    header = np.array([kind, values.ndim, *shape], dtype="<i4").tobytes()
    return header + values.astype("u1" if kind == BYTES else "<i4").tobytes()


def write(path, content):
    path.write_bytes(gzip.compress(content))
    return path


def test_values_stand_in_row_order(tmp_path):
    values = np.arange(2 * 2 * 3 * 2).reshape(2, 2, 3, 2)
    assert (read_matrix(write(tmp_path / "x.gz", matrix(BYTES, values))).numpy() == values).all()
    assert read_matrix(write(tmp_path / "y.gz", matrix(INTEGERS, np.array([3, 1, 4])))).tolist() == [3, 1, 4]


def test_damaged_files(tmp_path):
    whole = matrix(BYTES, np.zeros((2, 2, 2)))
    with pytest.raises(DataError, match=r"7 bytes of values where its header says \[2, 2, 2\]"):
        read_matrix(write(tmp_path / "x.gz", whole[:-1]))
    with pytest.raises(DataError, match="begins with 00 00 00 00"):
        read_matrix(write(tmp_path / "x.gz", bytes(20)))
    with pytest.raises(DataError, match="begins with"):
        read_matrix(write(tmp_path / "x.gz", b""))


def test_a_flipped_byte(tmp_path):
    path = write(tmp_path / "x.gz", matrix(BYTES, np.zeros((2, 2, 2))))
    content = bytearray(path.read_bytes())
    content[10] = 0xFF  # the first byte of the packed values
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.gz is damaged"):
        read_matrix(path)


def test_the_split_is_the_published_one():
    names = [file.name for file in smallnorb.SMALLNORB.files]
    assert all("5x46789x9x18x6x2x96x96-training" in name for name in names[:2])
    assert all("5x01235x9x18x6x2x96x96-testing" in name for name in names[2:])


def test_pairs_become_images_that_are_cropped_at_random_and_in_the_middle(tmp_path, monkeypatch):
    pairs = np.random.default_rng(0).integers(0, 256, (3, 2, 96, 96))
    contents = [matrix(BYTES, pairs), matrix(INTEGERS, np.array([4, 0, 2]))] * 2
    (tmp_path / "smallnorb").mkdir()
    made = []
    for file, content in zip(smallnorb.SMALLNORB.files, contents, strict=True):
        write(tmp_path / "smallnorb" / file.name, content)
        made.append(files.File(file.name, hashlib.md5(content).hexdigest(), "md5"))
    monkeypatch.setattr(smallnorb, "SMALLNORB", smallnorb.SMALLNORB._replace(files=tuple(made)))

    dataset = load("smallnorb", tmp_path)
    assert dataset.train_images.shape == (6, 1, 48, 48)
    assert dataset.train_labels.tolist() == [4, 4, 0, 0, 2, 2]
    assert dataset.train_images[1, 0, 0, 0] == round(pairs[0, 1, :2, :2].mean())

    images, labels = dataset.train_batch(torch.arange(6), ShardedGenerator(0))
    assert images.shape == (6, 1, 32, 32)
    assert torch.equal(labels, dataset.train_labels)
    for image, whole in zip(images, dataset.train_images, strict=True):
        assert any(torch.equal(image, whole[:, y : y + 32, x : x + 32]) for y in range(17) for x in range(17))
    assert torch.equal(dataset.centred().train_images, dataset.train_images[:, :, 8:40, 8:40])
