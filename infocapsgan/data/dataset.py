"""What a data set is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from infocapsgan.engine.rng import ShardedGenerator

DIGITS = tuple("0123456789")
Set = TypeVar("Set", bound="Dataset")
TENSORS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True)
class Dataset:
    """Images [N, channels, height, width] as uint8 in 0 … 255 and their labels [N] as int64.

    Images larger than `size` are cropped: training batches at random places, by centred() in the middle.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    size: int = 28
    class_names: tuple[str, ...] = DIGITS  # a short name for each label
    split: dict[str, list[str]] | None = None
    """Of --dataset folder: the paths in it of the images of "train" and of "test", in their order."""

    @property
    def labelled(self) -> bool:
        """Whether the training images are of more than one class; without labels all are 0."""
        return self.train_labels.unique().numel() > 1

    def train_batch(self, chosen: Tensor, rng: ShardedGenerator) -> tuple[Tensor, Tensor]:
        """Training images [B, channels, size, size] and labels of the indices `chosen` [B]."""
        images = self.train_images[chosen]
        if margin := images.shape[-1] - self.size:
            images = crop(images, rng.integers(margin + 1, len(chosen), 2), self.size)
        return images, self.train_labels[chosen]

    def test_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All test images and labels, up to `size` at a time."""
        return zip(self.test_images.split(size), self.test_labels.split(size), strict=True)

    def hold_out(self: Set, share: float) -> tuple[Set, Set]:
        """The data without a `share` of the training images (seed 0), and those as test images."""
        order = torch.randperm(len(self.train_labels), generator=torch.Generator().manual_seed(0))
        number = round(share * len(order))
        if not 0 < number < len(order):
            raise ValueError(f"share: got {share}, takes a share that leaves images on both sides")
        out, kept = order.to(self.train_labels.device).tensor_split([number])
        rest = replace(self, train_images=self.train_images[kept], train_labels=self.train_labels[kept])
        held_out = replace(rest, test_images=self.train_images[out], test_labels=self.train_labels[out])
        if self.split:
            train, test = ([self.split["train"][i] for i in part.tolist()] for part in (kept, out))
            rest = replace(rest, split=self.split | {"train": train})
            held_out = replace(held_out, split={"train": train, "test": test})
        return rest, held_out

    def centred(self: Set) -> Set:
        """The same data with every image cropped to its middle."""
        margin = self.train_images.shape[-1] - self.size
        if margin <= 0:  # pairs of digits are made larger than the images
            return self
        middle = slice(margin // 2, margin // 2 + self.size)
        train, test = (images[:, :, middle, middle] for images in (self.train_images, self.test_images))
        return replace(self, train_images=train, test_images=test)

    def to(self: Set, device: torch.device | str) -> Set:
        """The same data on `device`, where the batches are then made."""
        return replace(self, **{name: getattr(self, name).to(device) for name in TENSORS})

    def head(self: Set, images: int) -> Set:
        """The first `images` of each split."""
        split = self.split and {part: paths[:images] for part, paths in self.split.items()}
        return replace(self, split=split, **{name: getattr(self, name)[:images] for name in TENSORS})


def evenly(images: Tensor, number: int) -> Tensor:
    """`number` of the images, spread over all of them: files may be sorted by class."""
    return images[torch.linspace(0, len(images) - 1, number, dtype=torch.float64).round().long()]


def in_batches(function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """function(inputs), of many inputs [N, …] up to 500 at a time."""
    return torch.cat([function(part) for part in inputs.split(500)])


def crop(images: Tensor, corners: Tensor, size: int) -> Tensor:
    """The size × size pixels of each image [B, C, H, W] from its corner [B, 2] (row, column) on."""
    windows = images.unfold(2, size, 1).unfold(3, size, 1)  # each size × size pixels, by their corner
    return windows[torch.arange(len(images), device=images.device), :, corners[:, 0], corners[:, 1]]


def to_unit(images: Tensor) -> Tensor:
    """Images as uint8, or as floats in [0, 1] already → floats in [0, 1], what classifiers take."""
    return images if images.is_floating_point() else images.float() / 255


def to_symmetric(images: Tensor) -> Tensor:
    """Images as uint8, or as floats in [0, 1] → floats in [−1, 1], the range of a generator's tanh."""
    return images * 2 - 1 if images.is_floating_point() else images.float() / 127.5 - 1
