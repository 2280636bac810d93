"""What a data set is."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infocapsgan.engine.rng import ShardedGenerator


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

    @property
    def labelled(self) -> bool:
        """Whether the training images are of more than one class; without labels all are 0."""
        return self.train_labels.unique().numel() > 1

    def train_batch(self, chosen: Tensor, rng: ShardedGenerator) -> tuple[Tensor, Tensor]:
        """Training images [B, channels, size, size] and labels of the indices `chosen` [B]."""
        images = self.train_images[chosen]
        margin = images.shape[-1] - self.size
        if margin:
            images = crop(images, rng.integers(margin + 1, len(chosen), 2), self.size)
        return images, self.train_labels[chosen]

    def test_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All test images and labels, up to `size` at a time."""
        return zip(self.test_images.split(size), self.test_labels.split(size), strict=True)

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


def evenly(images: Tensor, number: int) -> Tensor:
    """`number` of the images, spread over all of them: files may be sorted by class."""
    return images[torch.linspace(0, len(images) - 1, number, dtype=torch.float64).round().long()]


def crop(images: Tensor, corners: Tensor, size: int) -> Tensor:
    """The size × size pixels of each image [B, C, H, W] from its corner [B, 2] (row, column) on."""
    rows, columns = (corners[:, :, None] + torch.arange(size, device=images.device)).unbind(1)
    batch = torch.arange(len(images), device=images.device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return images[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]


def to_unit(images: Tensor) -> Tensor:
    """Images as uint8 → float32 in [0, 1]; float images in [0, 1] as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def to_symmetric(images: Tensor) -> Tensor:
    """Images as uint8, or as float in [0, 1] → float in [−1, 1], the range of a generator's tanh."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images * 2 - 1
