"""MultiMNIST: two overlapping digits of different classes (Sabour, Frosst, Hinton 2017, section 6)."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from infocapsgan.data import mnist
from infocapsgan.data.dataset import Dataset, cropped
from infocapsgan.draw import Draw

SIZE, SHIFT = 36, 4
TEST_PAIRS = 100_000
TEST_SEED = 0


@dataclass(frozen=True)
class MultiMNIST(Dataset):
    """Single training digits, of which every batch is paired anew, and fixed test pairs.

    A pair [2, 36, 36] is its two digits, one a channel; overlaid() adds them to the image that is seen. Its
    labels are two numbers.
    """

    def train_batch(self, chosen: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """The digits `chosen` [B], each with one of another class: pairs [B, 2, 36, 36], labels [B, 2]."""
        return paired(self.train_images, self.train_labels, chosen, draw)

    def hold_out(self, share: float) -> tuple["MultiMNIST", "MultiMNIST"]:
        """As for every data set; the held-out digits are paired, once."""
        rest, held_out = super().hold_out(share)
        images, labels = fixed_pairs(held_out.test_images, held_out.test_labels, len(held_out.test_labels))
        return rest, replace(held_out, test_images=images, test_labels=labels)

    def centred(self) -> "MultiMNIST":
        """Itself: pairs are never cropped."""
        return self


def load(data_dir: str | Path | None = None, test_pairs: int = TEST_PAIRS) -> MultiMNIST:
    """Training digits of MNIST, and `test_pairs` pairs of its test digits, always the same.

    Each test digit is the first of as many pairs as any other, or of one more.
    """
    train_images, train_labels, test_images, test_labels = mnist.load_mnist(data_dir)
    pairs, labels = fixed_pairs(test_images, test_labels, test_pairs)
    return MultiMNIST("multi-mnist", train_images, train_labels, pairs, labels, size=SIZE)


def fixed_pairs(images: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The same `number` of pairs of these digits at every call."""
    draw = Draw(TEST_SEED, images.device)
    first = torch.arange(number, device=images.device) % len(labels)
    parts = [paired(images, labels, part, draw) for part in first.split(10_000)]
    pairs, both = zip(*parts, strict=True)
    return torch.cat(pairs), torch.cat(both)


def paired(images: Tensor, labels: Tensor, first: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """The digits `first` [B], each with one drawn evenly from the digits of all other classes.

    Each of the two is moved by up to 4 pixels along each axis within 36 × 36.
    """
    order = labels.argsort(stable=True)
    count = labels.bincount()
    start = (count.cumsum(0) - count)[labels[first]]
    own = count[labels[first]]
    # A place among the digits of other classes: those before one's own class, then those behind it.
    place = (draw.uniform(len(first)).double() * (len(labels) - own)).long()
    second = order[place + own * (place >= start)]
    digits = torch.stack([images[first, 0], images[second, 0]], dim=1).flatten(0, 1)[:, None]
    room = SIZE - images.shape[-1]
    padded = F.pad(digits, [room // 2 + SHIFT] * 4)
    corners = draw.integers(2 * SHIFT + 1, len(first), 2, 2).flatten(0, 1)
    pairs = cropped(padded, corners, SIZE).unflatten(0, (-1, 2)).squeeze(2)
    return pairs, torch.stack([labels[first], labels[second]], dim=1)


def overlaid(pairs: Tensor) -> Tensor:
    """Pairs [B, 2, H, W] in [0, 1] → the images that are seen [B, 1, H, W]: added and clipped."""
    return pairs.sum(dim=1, keepdim=True).clamp(max=1)
