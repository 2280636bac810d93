"""DCGAN's discriminator."""

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
