"""From a latent vector through class and primary capsules to an image."""

import torch
from torch import Tensor, nn

from capsops.nn import RoutingCapsules
from infocapsgan.models import capsule_encoder as encoder
from infocapsgan.models.capsule_encoder import CLASS_DIM, PRIMARY_DIM, Capsules

KERNEL_SIZE = 9  # of the convolutions of the encoder that this network inverts


class CapsuleGenerator(nn.Module):
    """Latent → class capsules → primary capsules → image: the layers of CapsuleEncoder in reverse order.

    Both capsule layers are squashed sums of predictions, s_j = Σ_i W_ij u_i, without routing. The primary
    capsules are laid out as `width` channels and enlarged by two transposed convolutions with the strides of
    the encoder. Each kernel is larger than 9 by what its convolution in the encoder leaves over at the edge,
    so that the maps have the encoder's sizes.

    Args:
        latent_dim: numbers in a latent vector.
        channels, size: of the image.
        classes: number of class capsules, each of 16 numbers.
        width: channels of the convolutions.
    """

    def __init__(self, latent_dim: int, channels: int, size: int, classes: int, *, width: int = 256) -> None:
        super().__init__()
        self.grid = encoder.primary_grid(size, KERNEL_SIZE)
        middle, stride = encoder.first_grid(size, KERNEL_SIZE), encoder.first_stride(size)
        primary = width // PRIMARY_DIM * self.grid**2
        self.classes = RoutingCapsules(1, classes, latent_dim, CLASS_DIM, iterations=0, bias=False)
        self.primary = RoutingCapsules(classes, primary, CLASS_DIM, PRIMARY_DIM, iterations=0, bias=False)
        self.enlarge = nn.ConvTranspose2d(width, width, middle - 2 * (self.grid - 1), stride=2)
        self.norm = nn.BatchNorm2d(width)
        self.paint = nn.ConvTranspose2d(width, channels, size - stride * (middle - 1), stride=stride)

    def forward(self, latent: Tensor) -> tuple[Tensor, Capsules]:
        """Latent vectors [B, latent_dim] → images [B, channels, size, size] in [−1, 1], and the capsules."""
        classes = self.classes(latent[:, None])
        primary = self.primary(classes)
        maps = primary.unflatten(1, (-1, self.grid**2)).transpose(2, 3)
        maps = maps.flatten(1, 2).unflatten(2, (self.grid, self.grid))
        images = torch.tanh(self.paint(self.norm(self.enlarge(maps)).relu()))
        return images, Capsules(primary, classes)
