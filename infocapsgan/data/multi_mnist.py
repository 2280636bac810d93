"""MultiMNIST: two overlapping digits of different classes (Sabour, Frosst, Hinton 2017, section 6)."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from infocapsgan.data import mnist
from infocapsgan.data.dataset import TENSORS, Dataset, crop
from infocapsgan.data.registry import ImageShape, register
from infocapsgan.engine.rng import ShardedGenerator

SIZE, SHIFT = 36, 4
TEST_PAIRS, TEST_SEED = 100_000, 0
STORED = 100_000  # test pairs that are kept as images; the others are rendered when they are used


class Pairs(NamedTuple):
    """Which digits are overlaid and where they lie: twelve bytes for a pair, whose image has 2,592."""

    digits: Tensor  # indices [N, 2] as int32
    corners: Tensor  # row and column of each digit's frame [N, 2, 2] as uint8


class ByClass:
    """Digits in the order of their labels [N]."""

    def __init__(self, labels: Tensor) -> None:
        self.order = labels.argsort(stable=True)
        self.counts = labels.bincount()
        self.starts = self.counts.cumsum(0) - self.counts  # place in `order` of the first of each class


@dataclass(frozen=True)
class MultiMNIST(Dataset):
    """Single training digits, paired at random for each batch, and fixed test pairs.

    A pair [2, 36, 36] is its two digits, one a channel; overlay() adds them to one image. It has two labels.
    `test_images` holds at most STORED pairs; test_batches() gives all of them.
    """

    test_digits: Tensor = field(kw_only=True)  # single ones [N, 1, 28, 28]
    test_digit_labels: Tensor = field(kw_only=True)
    pairs: Pairs | None = field(default=None, kw_only=True)  # None where `test_images` holds them all

    def train_batch(self, chosen: Tensor, rng: ShardedGenerator) -> tuple[Tensor, Tensor]:
        """The digits `chosen` [B], each with one of another class: pairs [B, 2, 36, 36], labels [B, 2]."""
        pairs = sample_pairs(self.train_labels, self._by_class, chosen, rng)
        return render(self.train_images, pairs), labels_of(self.train_labels, pairs)

    @cached_property
    def _by_class(self) -> ByClass:
        return ByClass(self.train_labels)

    def test_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        if self.pairs is None:
            yield from super().test_batches(size)
            return
        for *pairs, labels in zip(*(t.split(size) for t in (*self.pairs, self.test_labels)), strict=True):
            yield render(self.test_digits, Pairs(*pairs)), labels

    def with_test_pairs(self, number: int) -> "MultiMNIST":
        """The same digits with another number of test pairs; the first ones are the same for each number."""
        pairs = fixed_pairs(self.test_digit_labels, number)
        images = render(self.test_digits, Pairs(*(values[:STORED] for values in pairs)))
        labels = labels_of(self.test_digit_labels, pairs)
        return replace(self, test_images=images, test_labels=labels, pairs=pairs if number > STORED else None)

    def hold_out(self, share: float) -> tuple["MultiMNIST", "MultiMNIST"]:
        rest, out = super().hold_out(share)
        out = replace(out, test_digits=out.test_images, test_digit_labels=out.test_labels)
        return rest, out.with_test_pairs(len(out.test_labels))

    def to(self, device: torch.device | str) -> "MultiMNIST":
        """The same data on `device`; pairs that are not stored stay where they are."""
        digits, labels = self.test_digits.to(device), self.test_digit_labels.to(device)
        return replace(super().to(device), test_digits=digits, test_digit_labels=labels)

    def head(self, images: int) -> "MultiMNIST":
        """The first `images` training digits and test pairs, at most STORED."""
        return replace(super().head(min(images, STORED)), pairs=None)


@register("multi-mnist", ImageShape(1, SIZE, 10), labels=2, rank=6)
def load(data_dir: str | Path | None = None) -> MultiMNIST:
    """Training digits of MNIST, and TEST_PAIRS pairs of its test digits, always the same."""
    single = mnist.load_mnist(data_dir)
    return of_digits(*(getattr(single, name) for name in TENSORS))


def of_digits(
    images: Tensor, labels: Tensor, digits: Tensor, digit_labels: Tensor, test_pairs: int = TEST_PAIRS
) -> MultiMNIST:
    """The data set of training digits and their labels, test digits and their labels."""
    splits = images, labels, digits, digit_labels
    single = MultiMNIST("multi-mnist", *splits, SIZE, test_digits=digits, test_digit_labels=digit_labels)
    return single.with_test_pairs(test_pairs)


def fixed_pairs(labels: Tensor, number: int) -> Pairs:
    """Pairs of digits with these labels, always the same; each is the first of as many, or of one more."""
    labels, rng = labels.cpu(), ShardedGenerator(TEST_SEED)
    by_class = ByClass(labels)
    first = (torch.arange(number) % len(labels)).split(10_000)
    parts = [sample_pairs(labels, by_class, part, rng) for part in first]
    return Pairs(*(torch.cat(values) for values in zip(*parts, strict=True)))


def sample_pairs(labels: Tensor, by_class: ByClass, first: Tensor, rng: ShardedGenerator) -> Pairs:
    """The digits `first` [B], each with one sampled uniformly from all other classes, at random places."""
    own, start = by_class.counts[labels[first]], by_class.starts[labels[first]]
    # A place among the digits of other classes: those before one's own class, then those behind it.
    place = (rng.uniform(len(first)).double() * (len(labels) - own)).long()
    second = by_class.order[place + own * (place >= start)]
    corners = rng.integers(2 * SHIFT + 1, len(first), 2, 2)
    return Pairs(torch.stack([first, second], dim=1).int(), corners.to(torch.uint8))


def labels_of(labels: Tensor, pairs: Pairs) -> Tensor:
    """The labels [N, 2] of pairs of digits with the labels `labels`."""
    return labels[pairs.digits.long().to(labels.device)]


def render(images: Tensor, pairs: Pairs) -> Tensor:
    """Pairs [N, 2, 36, 36] of digits [M, 1, 28, 28]."""
    digits = images[pairs.digits.long().flatten().to(images.device)]
    padded = F.pad(digits, [(SIZE - images.shape[-1]) // 2 + SHIFT] * 4)
    corners = pairs.corners.long().flatten(0, 1).to(images.device)
    return crop(padded, corners, SIZE).unflatten(0, (-1, 2)).squeeze(2)


def overlay(pairs: Tensor) -> Tensor:
    """Pairs [B, 2, H, W] in [0, 1] → their images [B, 1, H, W]: added and clipped."""
    return pairs.sum(dim=1, keepdim=True).clamp(max=1)
