"""From a latent vector through class and primary capsules to an image."""

import torch
from torch import Tensor, nn

from capsops.nn import RoutingCapsules
from infocapsgan.models.capsule_encoder import PRIMARY_DIM, Capsules, primary_grid

KERNEL_SIZE = 9  # of the encoder's convolutions, which this network runs backwards


class CapsuleGenerator(nn.Module):
    """Latent → class capsules → primary capsules → image: the capsule encoder turned round.

    Both capsule layers are plain sums of predictions, squashed: s_j = Σ_i W_ij u_i, without routing. The
    primary capsules are laid out as `width` channels and enlarged by two transposed convolutions.

    Args:
        latent_dim: numbers in a latent vector.
        channels: of the image.
        size: height and width of the image in pixels.
        classes: number of class capsules.
        width: channels of the convolutions.
        class_dim: numbers in a class capsule.
    """

    def __init__(
        self,
        latent_dim: int,
        channels: int,
        size: int,
        classes: int,
        *,
        width: int = 256,
        class_dim: int = 16,
    ) -> None:
        super().__init__()
        self.grid = primary_grid(size, KERNEL_SIZE)
        primary = width // PRIMARY_DIM * self.grid**2
        self.classes = RoutingCapsules(1, classes, latent_dim, class_dim, iterations=0, bias=False)
        self.primary = RoutingCapsules(classes, primary, class_dim, PRIMARY_DIM, iterations=0, bias=False)
        self.enlarge = nn.ConvTranspose2d(width, width, KERNEL_SIZE + 1, stride=2)
        self.norm = nn.BatchNorm2d(width)
        self.paint = nn.ConvTranspose2d(width, channels, KERNEL_SIZE)

    def forward(self, latent: Tensor) -> tuple[Tensor, Capsules]:
        """Latent vectors [B, latent_dim] → images [B, channels, size, size] in [−1, 1], and the capsules."""
        classes = self.classes(latent[:, None])
        primary = self.primary(classes)
        maps = primary.unflatten(1, (-1, self.grid**2)).transpose(2, 3)
        maps = maps.reshape(len(latent), -1, self.grid, self.grid)
        images = torch.tanh(self.paint(self.norm(self.enlarge(maps)).relu()))
        return images, Capsules(primary, classes)
