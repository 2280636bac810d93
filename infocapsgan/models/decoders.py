"""From the capsule of a class back to its image."""

from itertools import pairwise

from torch import Tensor, nn

from infocapsgan.models.capsule_encoder import first_stride


class FullyConnectedDecoder(nn.Module):
    """J · D → 512 → 1024 → pixels in [0, 1] (Sabour, Frosst, Hinton 2017, figure 2).

    Args:
        capsules: J · D, numbers in all class capsules together.
        channels, size: of the image.
        batch_norm: whether to normalise before each ReLU.
    """

    def __init__(self, capsules: int, channels: int, size: int, *, batch_norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise((capsules, 512, 1024)):
            norm = [nn.BatchNorm1d(after)] if batch_norm else []
            layers += [nn.Linear(before, after), *norm, nn.ReLU()]
        layers += [nn.Linear(1024, channels * size**2), nn.Sigmoid()]
        self.layers = nn.Sequential(*layers, nn.Unflatten(1, (channels, size, size)))

    def forward(self, capsules: Tensor) -> Tensor:
        """Class capsules [B, J, D], masked → images [B, channels, size, size] in [0, 1]."""
        return self.layers(capsules.flatten(1))


class DeconvolutionalDecoder(nn.Module):
    """J · D → J maps → ConvT(32, k9, s2) → ConvT(64, k9) → ConvT(k2) → pixels in [0, 1].

    The maps are 6 × 6 for images of 28 × 28; larger images have one more ConvT(128, k9), and start from
    4 × 4 for 32 × 32. For images of 48 × 48 and more the last convolution has stride first_stride(size), a
    kernel of twice that and more, and the others make maps for an image that is smaller by that stride. At
    28 × 28 it has a fifth of the fully connected decoder's weights (public CapsNet studies).

    Args:
        capsules: J · D, numbers in all class capsules together.
        classes: J.
        channels, size: of the image; an even size of at least 18.
        batch_norm: whether to normalise before each ReLU.
    """

    def __init__(
        self, capsules: int, classes: int, channels: int, size: int, *, batch_norm: bool = False
    ) -> None:
        super().__init__()
        if size % 2 or size < 18:
            raise ValueError(f"size: got {size}, takes an even number of pixels, at least 18")
        stride = first_stride(size)
        half = size // stride // 2
        widths = (32, 64) if half <= 14 else (32, 64, 128)
        grid = half - 4 * len(widths)  # stride 2 and kernels of 9 make 2 · half − 1 of it
        layers: list[nn.Module] = [nn.Linear(capsules, classes * grid**2)]
        layers += [nn.BatchNorm1d(classes * grid**2)] if batch_norm else []
        layers += [nn.ReLU(), nn.Unflatten(1, (classes, grid, grid))]
        for before, after in pairwise((classes, *widths)):
            norm = [nn.BatchNorm2d(after)] if batch_norm else []
            layers += [nn.ConvTranspose2d(before, after, 9, stride=2 if after == 32 else 1), *norm, nn.ReLU()]
        last = nn.ConvTranspose2d(widths[-1], channels, size - stride * (2 * half - 2), stride=stride)
        self.layers = nn.Sequential(*layers, last, nn.Sigmoid())

    def forward(self, capsules: Tensor) -> Tensor:
        """Class capsules [B, J, D], masked → images [B, channels, size, size] in [0, 1]."""
        return self.layers(capsules.flatten(1))


def masked(capsules: Tensor, classes: Tensor) -> Tensor:
    """Class capsules [B, J, D] with all but those of `classes` [B] set to 0."""
    return capsules * nn.functional.one_hot(classes, capsules.shape[1]).unsqueeze(-1)
