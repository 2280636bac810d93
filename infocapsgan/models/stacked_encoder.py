"""From an image to class capsules by a stack of small convolutions."""

from torch import Tensor, nn

from capsops.nn import PrimaryCapsules, RoutingCapsules
from infocapsgan.models.capsule_encoder import PRIMARY_DIM, Capsules


class StackedCapsuleEncoder(nn.Module):
    """Image → four convolutions → primary capsules of 8 → routing → class capsules.

    In place of CapsuleEncoder's two convolutions of 9 × 9 there are five of 3 × 3 with width / 2, width,
    width, 2 · width and 2 · width channels, the last those of width / 4 types of primary capsules. The second
    and the last have stride 2. A primary capsule sees 17 × 17 pixels, as CapsuleEncoder's does. A deeper stem
    with batch norm under the capsules is the idea of Efficient-CapsNet (Mazzia, Salvetti, Chiaberge 2021),
    whose attention in place of routing is not used here.

    Args:
        channels: of the image.
        size: height and width of the image in pixels.
        classes: J, number of class capsules.
        width: a multiple of 8.
        class_dim: D, numbers in a class capsule.
        iterations: of the routing.
        leaky: whether the routing has an orphan class.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        classes: int,
        *,
        width: int = 64,
        class_dim: int = 16,
        iterations: int = 3,
        leaky: bool = False,
    ) -> None:
        super().__init__()
        layers, before = [], channels
        for after, stride in ((width // 2, 1), (width, 2), (width, 1), (2 * width, 1)):
            layers.append(nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False))
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        types, grid = before // PRIMARY_DIM, ((size + 1) // 2 - 3) // 2 + 1
        self.stem = nn.Sequential(*layers)
        self.primary = PrimaryCapsules(before, types, PRIMARY_DIM, 3, stride=2)
        self.classes = RoutingCapsules(
            types * grid**2, classes, PRIMARY_DIM, class_dim, iterations=iterations, leaky=leaky
        )

    def forward(self, images: Tensor) -> Capsules:
        """Images [B, C, H, W] → primary capsules [B, I, 8] and class capsules [B, J, D]."""
        primary = self.primary(self.stem(images))
        return Capsules(primary, self.classes(primary))
