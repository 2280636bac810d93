"""InfoGAN's networks."""

from itertools import pairwise

from torch import Tensor, nn


class InfoGANGenerator(nn.Module):
    """Latent → dense 16·width → dense maps of 2·width → ConvT k4 s2, …: InfoGAN's generator.

    Batch norm and ReLU between, tanh at the end. Images of 28 × 28 are enlarged twice from 7 × 7, of 32 × 32
    three times from 4 × 4 (Chen et al. 2016, appendix C.1), larger ones infogan_levels(size) times; output
    padding gives the odd sizes between.

    Args:
        latent_dim: numbers in a latent vector.
        channels, size: of the image.
        width: 64 as published.
    """

    def __init__(self, latent_dim: int, channels: int, size: int, *, width: int = 64) -> None:
        super().__init__()
        levels = infogan_levels(size)
        before, grid = width * 2 ** (levels - 1), size >> levels
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((latent_dim, 16 * width, before * grid**2)):
            layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
        layers.append(nn.Unflatten(1, (before, grid, grid)))
        for level in reversed(range(levels)):
            after, odd = before // 2 if level else channels, (size >> level) % 2
            layers.append(nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, output_padding=odd))
            layers += [nn.BatchNorm2d(after), nn.ReLU()] if level else [nn.Tanh()]
            before = after
        self.layers = nn.Sequential(*layers)

    def forward(self, latent: Tensor) -> Tensor:
        """Latent vectors [B, latent_dim] → images [B, channels, size, size] in [−1, 1]."""
        return self.layers(latent)


class InfoGANTrunk(nn.Module):
    """What InfoGAN's discriminator and recogniser share: Conv k4 s2 of width, 2·width, … → dense 16·width.

    Leaky ReLU 0.1, batch norm from the second layer on (Chen et al. 2016, appendix C.1).

    Args:
        channels, size: of the image.
        width: 64 as published.
        batch_norm: whether there is any.
    """

    def __init__(self, channels: int, size: int, *, width: int = 64, batch_norm: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = [width * 2**level for level in range(infogan_levels(size))]
        for before, after in pairwise((channels, *widths)):
            norm = [nn.BatchNorm2d(after)] if layers and batch_norm else []
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), *norm, nn.LeakyReLU(0.1)]
        layers += [nn.Flatten(), nn.Linear(widths[-1] * (size >> len(widths)) ** 2, 16 * width)]
        layers += [nn.BatchNorm1d(16 * width) if batch_norm else nn.Identity(), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] → features [B, 16 · width]."""
        return self.layers(images)


def infogan_levels(size: int) -> int:
    """How many times InfoGAN halves an image: until it is smaller than 8, 28 → 7, 32 → 4, 100 → 6."""
    return size.bit_length() - 3
