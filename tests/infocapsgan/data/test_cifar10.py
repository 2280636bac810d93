import hashlib
import pickle
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from infocapsgan.data import DataError, cifar10, files, image_shape, load
from infocapsgan.data.files import File


def content(images=2, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (images, 3072), dtype=np.uint8)
    return {b"data": pixels, b"labels": list(range(images)), b"batch_label": b"one", b"filenames": []}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / cifar10.SOURCE.folder).mkdir()
    for seed, file in enumerate(cifar10.SOURCE.files):
        (tmp_path / cifar10.SOURCE.folder / file.name).write_bytes(
            pickle.dumps(content(seed=seed), protocol=2)
        )
    return tmp_path


def test_six_files_make_the_set(folder):
    dataset = load("cifar10", folder)
    assert dataset.train_images.shape == (10, 3, 32, 32)
    assert dataset.train_labels.tolist() == [0, 1] * 5
    assert dataset.test_images.shape == (2, 3, 32, 32)
    assert dataset.size == image_shape("cifar10").size
    wanted = content(seed=1)[b"data"].reshape(2, 3, 32, 32)
    assert (dataset.train_images[2:4].numpy() == wanted).all()


def test_what_is_more_than_arrays_is_not_unpickled(tmp_path):
    path = tmp_path / "data_batch_1"
    path.write_bytes(b"cos\nsystem\n(S'echo unpickled'\ntR.")
    with pytest.raises(DataError, match=r"it names os\.system"):
        cifar10.read_batch(path)


def test_damaged_files(folder):
    path = folder / cifar10.SOURCE.folder / "data_batch_1"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match="data_batch_1 is not a CIFAR-10 file or is damaged"):
        load("cifar10", folder)
    path.write_bytes(pickle.dumps(content() | {b"labels": [1, 2, 3]}))
    with pytest.raises(DataError, match=r"values of shape \(2, 3072\), not of \[3, 3072\]"):
        load("cifar10", folder)


def test_a_wrong_byte_is_never_a_traceback(tmp_path):
    path, whole = tmp_path / "data_batch_1", pickle.dumps(content(), protocol=2)
    refused = 0
    for place in (*range(150), *range(len(whole) - 60, len(whole))):
        for byte in (0, 40, 82, 113, 255):
            path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
            try:
                cifar10.read_batch(path)  # some bytes are those of pixels, or of what is not read
            except DataError:
                refused += 1
    assert refused > 500


def test_the_archive_is_unpacked_once(folder, tmp_path, monkeypatch):
    target = tmp_path / "other"
    target.mkdir()
    archive = target / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(folder / cifar10.SOURCE.folder, cifar10.SOURCE.folder)
    known = File(archive.name, checksum(archive))
    monkeypatch.setattr(cifar10, "SOURCE", cifar10.SOURCE._replace(archive=known))
    monkeypatch.delenv("INFOCAPSGAN_DATA", raising=False)
    unpacked, atomic_folder = [], files.atomic_folder

    def slowly(path):
        unpacked.append(path)
        time.sleep(0.1)
        return atomic_folder(path)

    monkeypatch.setattr(files, "atomic_folder", slowly)
    with ThreadPoolExecutor(3) as pool:
        for dataset in pool.map(lambda _: load("cifar10", target), range(3)):
            assert dataset.train_images.shape == (10, 3, 32, 32)
    assert unpacked == [target / cifar10.SOURCE.folder]
    assert (target / cifar10.SOURCE.folder / "test_batch").is_file()


def checksum(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_without_a_network_the_six_files_are_named_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.delenv("INFOCAPSGAN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cifar10, "SOURCE", cifar10.SOURCE._replace(url="http://127.0.0.1:9/"))
    with pytest.raises(DataError) as caught:
        load("cifar10", tmp_path / "data")
    place = tmp_path / "data" / "cifar-10-batches-py"
    assert f"Put these files into {place}: data_batch_1, data_batch_2" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_folder_is_replaced(folder, tmp_path, monkeypatch):
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(folder / cifar10.SOURCE.folder, cifar10.SOURCE.folder)
    known = File(archive.name, checksum(archive))
    monkeypatch.setattr(cifar10, "SOURCE", cifar10.SOURCE._replace(archive=known))
    monkeypatch.delenv("INFOCAPSGAN_DATA", raising=False)
    (folder / cifar10.SOURCE.folder / "data_batch_2").unlink()
    assert load("cifar10", folder).train_images.shape == (10, 3, 32, 32)
