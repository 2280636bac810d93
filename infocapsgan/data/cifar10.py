"""CIFAR-10 in its python format: six files of 10,000 images of 3 × 32 × 32."""

import pickle
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from infocapsgan.data.files import DataError, File, Source, download, folders, held, unreachable
from infocapsgan.engine.atomic import atomic_folder

FOLDER = "cifar-10-batches-py"
TRAIN, TEST = tuple(f"data_batch_{number}" for number in range(1, 6)), "test_batch"
ARCHIVE = Source(
    folder="",
    url="https://www.cs.toronto.edu/~kriz/",
    files=(
        File("cifar-10-python.tar.gz", "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"),
    ),
)

# What unpickling a damaged file raises.
DAMAGED = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OverflowError,
    TypeError,
    ValueError,
)


def load(data_dir: str | Path | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images [50000, 3, 32, 32], train labels, test images [10000, 3, 32, 32], test labels."""
    folder = _find(data_dir)
    train = [read_batch(folder / name) for name in TRAIN]
    images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    return images, labels, *read_batch(folder / TEST)


def read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """One file → images [N, 3, 32, 32] as uint8, labels [N].

    The format: a pickled dictionary with b"data", [N, 3072] in the order of channels, rows, columns, and
    b"labels". Only what that takes is unpickled.

    Raises:
        DataError: the file is not that, or is cut short.
    """
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
        images, labels = np.asarray(content[b"data"]), torch.tensor(content[b"labels"])
    except DAMAGED as error:
        raise DataError(f"{path} is not a CIFAR-10 file or is damaged ({error})") from error
    if images.dtype != np.uint8 or images.shape != (len(labels), 3072):
        raise DataError(f"{path} holds values of shape {images.shape}, not of [{len(labels)}, 3072]")
    return torch.from_numpy(images.reshape(-1, 3, 32, 32).copy()), labels.long()


class _ArraysOnly(pickle.Unpickler):
    """Makes numpy arrays and plain values, and refuses everything else that a pickle can name."""

    ALLOWED: ClassVar = {
        ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
        ("numpy", "dtype"): np.dtype,
        ("numpy", "ndarray"): np.ndarray,
    }

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.ndarray.__reduce__(np.empty(0))[0]
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self.ALLOWED[module, name]


def _find(data_dir: str | Path | None) -> Path:
    places = folders(data_dir)
    for place in places:
        if _is_whole(place / FOLDER):
            return place / FOLDER
    target = places[0] if data_dir else places[-1]
    try:
        with held(target / FOLDER):
            if not _is_whole(target / FOLDER):  # another process may have made it meanwhile
                _make(target)
    except OSError as error:
        wanted = [*TRAIN, TEST]
        raise unreachable("cifar10", places, ARCHIVE.url, target / FOLDER, wanted, error) from error
    return target / FOLDER


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (*TRAIN, TEST))


def _make(target: Path) -> None:
    (file,) = ARCHIVE.files
    archive = download(ARCHIVE.url + file.name, target / file.name, file)
    with tarfile.open(archive) as packed, atomic_folder(target / FOLDER) as temporary:
        for name in (*TRAIN, TEST):
            (temporary / name).write_bytes(packed.extractfile(f"{FOLDER}/{name}").read())
