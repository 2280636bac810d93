"""CIFAR-10 in its python format: six files of 10,000 images of 3 × 32 × 32."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infocapsgan.data.dataset import Dataset
from infocapsgan.data.files import DataError, File, Source, find
from infocapsgan.data.registry import ImageShape, register

ARCHIVE = File("cifar-10-python.tar.gz", "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce")
FILES = (*(File(f"data_batch_{number}") for number in range(1, 6)), File("test_batch"))
SOURCE = Source("cifar-10-batches-py", "https://www.cs.toronto.edu/~kriz/", FILES, archive=ARCHIVE)
CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@register("cifar10", ImageShape(3, 32, 10), rank=4)
def load(data_dir: str | Path | None = None) -> Dataset:
    """50,000 training images and 10,000 test images [3, 32, 32] of ten classes."""
    *train, test = (read_batch(path) for path in find(SOURCE, data_dir))
    images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    return Dataset("cifar10", images, labels, *test, size=32, class_names=CLASSES)


def read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """One file → images [N, 3, 32, 32] as uint8, labels [N].

    The format: a pickled dictionary with b"data", [N, 3072] in the order of channels, rows, columns, and
    b"labels". Only what that takes is unpickled.
    """
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
        images, labels = np.asarray(content[b"data"]), torch.tensor(content[b"labels"])
    except Exception as error:  # there is hardly one that unpickling a damaged file does not raise
        raise DataError(f"{path} is not a CIFAR-10 file or is damaged ({error})") from error
    if images.dtype != np.uint8 or images.shape != (len(labels), 3072):
        raise DataError(f"{path} holds values of shape {images.shape}, not of [{len(labels)}, 3072]")
    return torch.from_numpy(images.reshape(-1, 3, 32, 32).copy()), labels.long()


class _ArraysOnly(pickle.Unpickler):
    """Makes numpy arrays and plain values, and refuses everything else that a pickle can name."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {"_codecs.encode": str.encode, "numpy.dtype": np.dtype, "numpy.ndarray": np.ndarray}
        allowed["numpy.core.multiarray._reconstruct"] = np.ndarray.__reduce__(np.empty(0))[0]
        wanted = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # by the version of numpy
        if wanted not in allowed:
            raise pickle.UnpicklingError(f"it names {wanted}")
        return allowed[wanted]
