"""From an image to class capsules by a stack of small convolutions."""

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from capsops.nn import PrimaryCapsules, RoutingCapsules
from infocapsgan.models.capsule_encoder import CLASS_DIM, PRIMARY_DIM, Capsules


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
