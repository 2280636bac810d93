"""CapsuleGAN: a DCGAN generator against a CapsNet discriminator.

`published` is what the author's code does; `--generator text` is the generator of the text. Its generator
steps trained the discriminator too; ours do not.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from infocapsgan.engine.settings import Count
from infocapsgan.models.capsule_encoder import CLASS_DIM, CapsuleEncoder
from infocapsgan.systems.dcgan import DCGAN, DCGANSettings
from infocapsgan.systems.system import CapsuleSystem

CLASS_CAPSULES = 10


@dataclass(frozen=True, kw_only=True)
class CapsuleGANSettings(DCGANSettings):
    """CapsuleGAN: convolutional or capsule generator, capsule discriminator."""

    iterations: Count = 5
    """Routing iterations of the discriminator."""


class CapsuleDiscriminator(nn.Module):
    """Capsule encoder with kernels of 7 → 10 capsules of 16 → dense 64, ReLU → logit."""

    def __init__(self, channels: int, size: int, *, width: int, iterations: int) -> None:
        super().__init__()
        self.encoder = CapsuleEncoder(
            channels, size, CLASS_CAPSULES, width=width, kernel_size=7, iterations=iterations, bias=False
        )
        hidden = nn.Linear(CLASS_CAPSULES * CLASS_DIM, 64)
        self.verdict = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(64, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] → logits [B], above 0 for real."""
        return self.verdict(self.encoder(images).classes).flatten()


class CapsuleGAN(CapsuleSystem, DCGAN, name="capsulegan"):
    """CapsuleGAN; see the module."""

    Settings = CapsuleGANSettings
    settings: CapsuleGANSettings
    tuned: ClassVar = {"digits": {"generator_width": 32, "width": 32, "epochs": 30}}

    def make_discriminator(self) -> nn.Module:
        s, (channels, size, _) = self.settings, self.image_shape
        return CapsuleDiscriminator(channels, size, width=s.width, iterations=s.iterations)
