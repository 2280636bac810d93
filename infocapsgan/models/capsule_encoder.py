"""From an image to class capsules."""

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
