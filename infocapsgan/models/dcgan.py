"""DCGAN's discriminator, and CapsuleGAN's two generators: that of its code and that of its text."""

from itertools import pairwise

from torch import Tensor, nn


class ConvolutionalDiscriminator(nn.Module):
    """Three strided convolutions k4 of width/4, width/2, width channels → logit (Radford et al. 2016, DCGAN).

    Batch norm after the second and third, leaky ReLU 0.2.

    Args:
        channels, size: of the image.
        width: channels of the last convolution.
    """

    def __init__(self, channels: int, size: int, *, width: int = 256) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise((channels, width // 4, width // 2, width)):
            norm = [nn.BatchNorm2d(after)] if layers else []
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), *norm, nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (size // 8) ** 2, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] → logits [B], above 0 for real."""
        return self.layers(images).flatten()


class UpsamplingGenerator(nn.Module):
    """Latent → dense, two times (enlarge, Conv k3, ReLU) → Conv k3, tanh: CapsuleGAN's code.

    Args:
        latent_dim: numbers in a latent vector.
        channels, size: of the image; the size is a multiple of 4.
        width: channels of the first maps and the first convolution; the second has half.
    """

    def __init__(self, latent_dim: int, channels: int, size: int, *, width: int = 128) -> None:
        super().__init__()
        layers = _first_maps(latent_dim, width, size // 4)
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width // 2, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width // 2, channels, 3, padding=1), nn.Tanh())

    def forward(self, latent: Tensor) -> Tensor:
        """Latent vectors [B, latent_dim] → images [B, channels, size, size] in [−1, 1]."""
        return self.layers(latent)


class TransposedGenerator(nn.Module):
    """Latent → 128 × 3 × 3 → 64 × 5 × 5 → 32 × 7 × 7 → 3 × 14 × 14 → 28 × 28: CapsuleGAN's text.

    Transposed convolutions with 3 × 3 kernels, ReLU between, tanh at the end. Images of another size start
    from maps of size / 4 − 4.

    Args:
        latent_dim: numbers in a latent vector.
        channels, size: of the image; the size is a multiple of 4, at least 28.
        width: channels of the first maps; then a half, a quarter, and 3.
    """

    def __init__(self, latent_dim: int, channels: int, size: int, *, width: int = 128) -> None:
        super().__init__()
        layers = _first_maps(latent_dim, width, size // 4 - 4)
        layers += [nn.ConvTranspose2d(width, width // 2, 3), nn.ReLU()]
        layers += [nn.ConvTranspose2d(width // 2, width // 4, 3), nn.ReLU()]
        layers += [nn.ConvTranspose2d(width // 4, 3, 3, stride=2, padding=1, output_padding=1), nn.ReLU()]
        layers += [nn.ConvTranspose2d(3, channels, 3, stride=2, padding=1, output_padding=1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, latent: Tensor) -> Tensor:
        """Latent vectors [B, latent_dim] → images [B, channels, size, size] in [−1, 1]."""
        return self.layers(latent)


def _first_maps(latent_dim: int, width: int, size: int) -> list[nn.Module]:
    return [nn.Linear(latent_dim, width * size**2), nn.ReLU(), nn.Unflatten(1, (width, size, size))]
