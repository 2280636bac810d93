"""From an image to class capsules."""

from typing import NamedTuple

from torch import Tensor, nn

from capsops.nn import PrimaryCapsules, RoutingCapsules

PRIMARY_DIM = 8  # K: numbers in a primary capsule


class Capsules(NamedTuple):
    """The two layers of capsules that encoder and capsule generator have in common."""

    primary: Tensor  # [B, I, 8]
    classes: Tensor  # [B, J, D]


class CapsuleEncoder(nn.Module):
    """Image → Conv, ReLU → primary capsules of 8 → routing → class capsules (Sabour et al. 2017, figure 1).

    The first convolution has stride 1, and first_stride(size) for images of 48 × 48 and more.

    Args:
        channels: of the image.
        size: height and width of the image in pixels.
        classes: J, number of class capsules.
        width: channels of both convolutions; width / 8 types of primary capsules.
        class_dim: D, numbers in a class capsule.
        kernel_size: of both convolutions; the second has stride 2.
        iterations: of the routing.
        batch_norm: whether to normalise between the first convolution and its ReLU.
        bias: whether the class capsules have a learned β.
        leaky: whether the routing has an orphan class.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        classes: int,
        *,
        width: int = 256,
        class_dim: int = 16,
        kernel_size: int = 9,
        iterations: int = 3,
        batch_norm: bool = False,
        bias: bool = True,
        leaky: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel_size, stride=first_stride(size))
        self.norm = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.primary = PrimaryCapsules(width, width // PRIMARY_DIM, PRIMARY_DIM, kernel_size, stride=2)
        self.classes = RoutingCapsules(
            width // PRIMARY_DIM * primary_grid(size, kernel_size) ** 2,
            classes,
            PRIMARY_DIM,
            class_dim,
            iterations=iterations,
            bias=bias,
            leaky=leaky,
        )

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

    √(‖v‖ / (1 − ‖v‖)), for ‖v‖ = ‖s‖² / (1 + ‖s‖²). Where s is short, the gradient of ‖v‖ nearly
    vanishes; that of ‖s‖ does not, so that a loss of it still trains capsules that are almost 0. At 0 and
    from 100 on the gradient is 0.
    """
    squashed = lengths(capsules).float()
    return (squashed / (1 - squashed).clamp(min=1e-4)).clamp(1e-12, 1e4).sqrt()
