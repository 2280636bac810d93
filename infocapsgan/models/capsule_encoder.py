"""From an image to class capsules."""

from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn

from capsops.nn import PrimaryCapsules, RoutingCapsules

PRIMARY_DIM = 8  # K: numbers in a primary capsule
CLASS_DIM = 16  # D: numbers in a class capsule


class Capsules(NamedTuple):
    """The two layers of capsules that encoder and capsule generator have in common."""

    primary: Tensor  # [B, I, 8]
    classes: Tensor  # [B, J, D]


class CapsuleEncoder(nn.Module):
    """Image → Conv, ReLU → primary capsules of 8 → routing → class capsules (Sabour et al. 2017, figure 1).

    The first convolution has stride 1, and first_stride(size) for images of 48 × 48 and more.

    Args:
        channels, size: of the image.
        classes: J, number of class capsules, each of 16 numbers.
        width: channels of both convolutions; width / 8 types of primary capsules.
        kernel_size: of both convolutions; the second has stride 2.
        batch_norm: whether to normalise between the first convolution and its ReLU.
        routing: options of capsops.nn.RoutingCapsules.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        classes: int,
        *,
        width: int = 256,
        kernel_size: int = 9,
        batch_norm: bool = False,
        **routing: Any,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel_size, stride=first_stride(size))
        self.norm = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.primary = PrimaryCapsules(width, width // PRIMARY_DIM, PRIMARY_DIM, kernel_size, stride=2)
        primary = width // PRIMARY_DIM * primary_grid(size, kernel_size) ** 2
        self.classes = RoutingCapsules(primary, classes, PRIMARY_DIM, CLASS_DIM, **routing)

    def forward(self, images: Tensor) -> Capsules:
        """Images [B, C, H, W] → primary capsules [B, I, 8] and class capsules [B, J, D]."""
        primary = self.primary(self.norm(self.conv(images)).relu())
        return Capsules(primary, self.classes(primary))


class StackedCapsuleEncoder(nn.Module):
    """Image → four convolutions → primary capsules of 8 → routing → class capsules.

    CapsuleEncoder has two convolutions of 9 × 9; this has five of 3 × 3 with width / 2, width, width,
    2 · width and 2 · width channels, the last those of width / 4 types of primary capsules. The second and
    the last have stride 2; the first too for images of 48 × 48 and more, the third for 96 × 96 and more. For
    images below 48 × 48 a primary capsule sees 17 × 17 pixels, as CapsuleEncoder's does. A deeper stem with
    batch norm is the idea of Efficient-CapsNet (Mazzia, Salvetti, Chiaberge 2021); this network has routing.

    Args:
        channels, size: of the image.
        classes: J, number of class capsules, each of 16 numbers.
        width: a multiple of 8.
        routing: options of capsops.nn.RoutingCapsules.
    """

    def __init__(self, channels: int, size: int, classes: int, *, width: int = 64, **routing: Any) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        strides = (2 if size >= 48 else 1, 2, 2 if size >= 96 else 1, 1)
        widths = pairwise((channels, width // 2, width, width, 2 * width))
        for (before, after), stride in zip(widths, strides, strict=True):
            layers.append(nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False))
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
            size = (size - 1) // stride + 1
        types, grid = 2 * width // PRIMARY_DIM, (size - 3) // 2 + 1
        self.stem = nn.Sequential(*layers)
        self.primary = PrimaryCapsules(2 * width, types, PRIMARY_DIM, 3, stride=2)
        self.classes = RoutingCapsules(types * grid**2, classes, PRIMARY_DIM, CLASS_DIM, **routing)

    def forward(self, images: Tensor) -> Capsules:
        """Images [B, C, H, W] → primary capsules [B, I, 8] and class capsules [B, J, D]."""
        primary = self.primary(self.stem(images))
        return Capsules(primary, self.classes(primary))


def first_stride(size: int) -> int:
    """The stride that brings images of `size` pixels to about 32: size / 32, rounded; 1 below 48."""
    return max(1, (size + 16) // 32)


def first_grid(size: int, kernel_size: int) -> int:
    """Height and width of what the first convolution makes of images of `size` pixels."""
    return (size - kernel_size) // first_stride(size) + 1


def primary_grid(size: int, kernel_size: int) -> int:
    """Height and width of the grid of primary capsules for images of `size` pixels."""
    return (first_grid(size, kernel_size) - kernel_size) // 2 + 1


def lengths(capsules: Tensor) -> Tensor:
    """‖v‖ of capsules [..., D] → [...]; its gradient at 0 is 0."""
    return capsules.norm(dim=-1)


def unsquashed_lengths(capsules: Tensor) -> Tensor:
    """‖s‖ of capsules v = squash(s) [..., D] → [...], in float32.

    √(‖v‖ / (1 − ‖v‖)), for ‖v‖ = ‖s‖² / (1 + ‖s‖²). Where s is short, the gradient of ‖v‖ nearly vanishes,
    that of ‖s‖ does not: a loss of it still trains capsules almost at 0. At 0 and from 100 on it is 0.
    """
    squashed = lengths(capsules).float()
    return (squashed / (1 - squashed).clamp(min=1e-4)).clamp(1e-12, 1e4).sqrt()
