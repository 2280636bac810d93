"""What a data set is, and the table of those there are."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from infocapsgan.data import digits, mnist


class ImageShape(NamedTuple):
    """What a model must know of a data set."""

    channels: int
    size: int  # height and width in pixels
    classes: int


@dataclass(frozen=True)
class Dataset:
    """Images [N, channels, size, size] as uint8 in 0 … 255 and their labels [N] as int64."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data on `device`, where the batches are then drawn."""
        return replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )

    def head(self, images: int) -> "Dataset":
        """The first `images` of each split."""
        return replace(
            self,
            train_images=self.train_images[:images],
            train_labels=self.train_labels[:images],
            test_images=self.test_images[:images],
            test_labels=self.test_labels[:images],
        )


_SETS = {
    "digits": (ImageShape(1, 28, 10), digits.load),
    "mnist": (ImageShape(1, 28, 10), mnist.load_mnist),
    "fashion-mnist": (ImageShape(1, 28, 10), mnist.load_fashion_mnist),
}
NAMES = tuple(_SETS)


def image_shape(name: str) -> ImageShape:
    """Channels, size and classes of the data set `name`, known before its files are read."""
    return _find(name)[0]


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Reads a data set, and downloads it first where it is missing.

    Args:
        name: one of `NAMES`.
        data_dir: the folder that holds `mnist/` and its like; None looks in $INFOCAPSGAN_DATA, then in the
            user's cache folder.

    Raises:
        ValueError: no data set has that name.
        DataError: a file is damaged, or is missing and could not be downloaded.
    """
    return Dataset(name, *_find(name)[1](data_dir))


def _find(name: str):
    if name not in _SETS:
        raise ValueError(f"dataset: got {name!r}, takes one of {', '.join(NAMES)}")
    return _SETS[name]


def to_unit(images: Tensor) -> Tensor:
    """uint8 → float32 in [0, 1], what classifiers take."""
    return images.float() / 255


def to_symmetric(images: Tensor) -> Tensor:
    """uint8 → float32 in [−1, 1], the range of a generator's tanh."""
    return images.float() / 127.5 - 1
