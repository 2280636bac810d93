"""What a data set is, and the table of those there are."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from infocapsgan.data import cifar10, digits, folder, mnist, smallnorb
from infocapsgan.draw import Draw


class ImageShape(NamedTuple):
    """What a model must know of a data set."""

    channels: int
    size: int  # height and width in pixels
    classes: int


@dataclass(frozen=True)
class Dataset:
    """Images [N, channels, height, width] as uint8 in 0 … 255 and their labels [N] as int64.

    Images may be larger than `size`: a training batch is then cropped at random places, and
    centred() crops the middle, for evaluations.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    size: int = 28

    def train_batch(self, chosen: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Training images [B, channels, size, size] and labels of the indices `chosen` [B]."""
        images = self.train_images[chosen]
        margin = images.shape[-1] - self.size
        if margin:
            images = cropped(images, draw.integers(margin + 1, len(chosen), 2), self.size)
        return images, self.train_labels[chosen]

    def hold_out(self, share: float) -> tuple["Dataset", "Dataset"]:
        """The data without a `share` of the training images (seed 0), and those as test images."""
        order = torch.randperm(len(self.train_labels), generator=torch.Generator().manual_seed(0))
        number = round(share * len(order))
        if not 0 < number < len(order):
            raise ValueError(f"share: got {share}, takes a share that leaves images on both sides")
        out, kept = order[:number].to(self.train_labels.device), order[number:].to(self.train_labels.device)
        rest = replace(self, train_images=self.train_images[kept], train_labels=self.train_labels[kept])
        return rest, replace(rest, test_images=self.train_images[out], test_labels=self.train_labels[out])

    def centred(self) -> "Dataset":
        """The same data with every image cropped to its middle."""
        margin = self.train_images.shape[-1] - self.size
        if not margin:
            return self
        middle = slice(margin // 2, margin // 2 + self.size)
        return replace(
            self,
            train_images=self.train_images[:, :, middle, middle],
            test_images=self.test_images[:, :, middle, middle],
        )

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
    "cifar10": (ImageShape(3, 32, 10), cifar10.load),
    "smallnorb": (ImageShape(1, 32, 5), smallnorb.load),
    "folder": (ImageShape(3, folder.SIZE, folder.CLASSES_WITHOUT_FOLDERS), folder.load),
}
NAMES = tuple(_SETS)


def image_shape(name: str, data_dir: str | Path | None = None) -> ImageShape:
    """Channels, size and classes of the data set `name`, known before its files are read."""
    shape = _find(name)[0]
    return shape._replace(classes=folder.classes(data_dir)) if name == "folder" else shape


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
    shape, read = _find(name)
    return Dataset(name, *read(data_dir), size=shape.size)


def _find(name: str):
    if name not in _SETS:
        raise ValueError(f"dataset: got {name!r}, takes one of {', '.join(NAMES)}")
    return _SETS[name]


def cropped(images: Tensor, corners: Tensor, size: int) -> Tensor:
    """The size × size pixels of each image [B, C, H, W] from its corner [B, 2] (row, column) on."""
    rows, columns = (corners[:, :, None] + torch.arange(size, device=images.device)).unbind(1)
    batch = torch.arange(len(images), device=images.device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return images[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]


def to_unit(images: Tensor) -> Tensor:
    """uint8 → float32 in [0, 1], what classifiers take."""
    return images.float() / 255


def to_symmetric(images: Tensor) -> Tensor:
    """uint8 → float32 in [−1, 1], the range of a generator's tanh."""
    return images.float() / 127.5 - 1
