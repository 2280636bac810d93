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
from infocapsgan.data.dataset import Dataset, crop
from infocapsgan.data.registry import ImageShape, register
from infocapsgan.engine.rng import ShardedGenerator

SIZE, SHIFT = 36, 4
TEST_PAIRS = 100_000
TEST_SEED = 0
STORED = 100_000  # test pairs that are kept as images; the others are rendered when they are used


class Pairs(NamedTuple):
    """Which digits are overlaid and where they lie: twelve bytes for a pair, whose image has 2,592."""

    digits: Tensor  # indices [N, 2] as int32
    corners: Tensor  # row and column of each digit's frame [N, 2, 2] as uint8


class ByClass(NamedTuple):
    """Digits in the order of their labels."""

    order: Tensor  # indices [N]
    counts: Tensor  # digits of each class
    starts: Tensor  # place in `order` of the first of each class

    @classmethod
    def of(cls, labels: Tensor) -> "ByClass":
        """From the labels [N]."""
        count = labels.bincount()
        return cls(labels.argsort(stable=True), count, count.cumsum(0) - count)


@dataclass(frozen=True)
class MultiMNIST(Dataset):
    """Single training digits, paired at random for each batch, and fixed test pairs.

    A pair [2, 36, 36] is its two digits, one a channel; overlay() adds them to one image. It has two labels.
    `test_images` holds at most STORED pairs; test_batches() gives all of them.

    Attributes:
        test_digits: single test digits [N, 1, 28, 28].
        test_digit_labels: their labels [N].
        pairs: how the test pairs are made of them; None where `test_images` holds them all.
    """

    test_digits: Tensor = field(kw_only=True)
    test_digit_labels: Tensor = field(kw_only=True)
    pairs: Pairs | None = field(default=None, kw_only=True)

    def train_batch(self, chosen: Tensor, rng: ShardedGenerator) -> tuple[Tensor, Tensor]:
        """The digits `chosen` [B], each with one of another class: pairs [B, 2, 36, 36], labels [B, 2]."""
        pairs = sample_pairs(self.train_labels, self._by_class, chosen, rng)
        return render(self.train_images, pairs), labels_of(self.train_labels, pairs)

    @cached_property
    def _by_class(self) -> ByClass:
        return ByClass.of(self.train_labels)

    def test_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All test pairs and their labels, up to `size` at a time."""
        if self.pairs is None:
            yield from super().test_batches(size)
            return
        for start in range(0, len(self.test_labels), size):
            place = slice(start, start + size)
            pairs = Pairs(*(values[place].to(self.test_digits.device) for values in self.pairs))
            yield render(self.test_digits, pairs), self.test_labels[place]

    def with_test_pairs(self, number: int) -> "MultiMNIST":
        """The same digits with another number of test pairs; the first ones are the same for each number."""
        pairs = fixed_pairs(self.test_digit_labels, number)
        return replace(
            self,
            test_images=render(self.test_digits, Pairs(*(values[:STORED] for values in pairs))),
            test_labels=labels_of(self.test_digit_labels, pairs),
            pairs=pairs if number > STORED else None,
        )

    def hold_out(self, share: float) -> tuple["MultiMNIST", "MultiMNIST"]:
        """As of every data set; the pairs of the held-out digits are fixed."""
        rest, held_out = super().hold_out(share)
        digits, labels = held_out.test_images, held_out.test_labels
        held_out = replace(held_out, test_digits=digits, test_digit_labels=labels)
        return rest, held_out.with_test_pairs(len(labels))

    def centred(self) -> "MultiMNIST":
        """Itself: pairs are never cropped."""
        return self

    def to(self, device: torch.device | str) -> "MultiMNIST":
        """The same data on `device`; pairs that are not stored stay where they are."""
        digits, labels = self.test_digits.to(device), self.test_digit_labels.to(device)
        return replace(super().to(device), test_digits=digits, test_digit_labels=labels)

    def head(self, images: int) -> "MultiMNIST":
        """The first `images` training digits and test pairs, at most STORED."""
        return replace(super().head(min(images, STORED)), pairs=None)


@register("multi-mnist", ImageShape(1, SIZE, 10), labels=2, rank=6)
def load(data_dir: str | Path | None = None) -> MultiMNIST:
    """Training digits of MNIST, and TEST_PAIRS pairs of its test digits, always the same.

    Each test digit is the first of as many pairs as any other, or of one more.
    """
    single = mnist.load_mnist(data_dir)
    return of_digits(single.train_images, single.train_labels, single.test_images, single.test_labels)


def of_digits(
    images: Tensor, labels: Tensor, digits: Tensor, digit_labels: Tensor, test_pairs: int = TEST_PAIRS
) -> MultiMNIST:
    """The data set of training digits and their labels, test digits and their labels."""
    splits = images, labels, digits, digit_labels
    single = MultiMNIST("multi-mnist", *splits, SIZE, test_digits=digits, test_digit_labels=digit_labels)
    return single.with_test_pairs(test_pairs)


def fixed_pairs(labels: Tensor, number: int) -> Pairs:
    """The same `number` of pairs of digits with these labels at every call, on the CPU."""
    labels, rng = labels.cpu(), ShardedGenerator(TEST_SEED)
    first = torch.arange(number) % len(labels)
    by_class = ByClass.of(labels)
    parts = [sample_pairs(labels, by_class, part, rng) for part in first.split(10_000)]
    return Pairs(*(torch.cat(values) for values in zip(*parts, strict=True)))


def sample_pairs(labels: Tensor, by_class: ByClass, first: Tensor, rng: ShardedGenerator) -> Pairs:
    """The digits `first` [B], each with one sampled uniformly from the digits of all other classes.

    Each of the two is moved by up to 4 pixels along each axis within 36 × 36.
    """
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
