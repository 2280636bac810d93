"""DCGAN: CapsuleGAN's generator, losses and optimiser with a discriminator of convolutions, to compare with.

Source of the discriminator: Radford, Metz, Chintala 2016.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from infocapsgan.engine.settings import Count, Weight
from infocapsgan.engine.train_state import adam
from infocapsgan.models.capsule_generator import CapsuleGenerator
from infocapsgan.models.capsulegan import TransposedGenerator, UpsamplingGenerator
from infocapsgan.models.dcgan import ConvolutionalDiscriminator
from infocapsgan.systems.gan import ADAM_BETAS, GANSettings, LatentGAN


@dataclass(frozen=True, kw_only=True)
class DCGANSettings(GANSettings):
    """DCGAN: CapsuleGAN's generator against a discriminator of convolutions."""

    batch_size: Count | None = 16
    """Real images per step, over all processes; as many are generated (published: 32 together)."""
    noise_dim: Count | None = None
    """Normal values in a latent vector [100, of the generator text 28]."""
    generator: Literal["code", "text", "capsule"] = "code"
    """That of CapsuleGAN's code, that of its text, or one of capsules."""
    generator_width: Count = 128
    """Channels of the generator's first maps; capsule takes --width."""
    learning_rate: Weight = 2e-4
    """Of both networks."""


class DCGAN(LatentGAN, name="dcgan"):
    """DCGAN; see the module."""

    Settings = DCGANSettings
    recipes: ClassVar = {
        "tuned": {"batch_size": 64},
        # What was published as 10,000 epochs are steps of one batch; as many epochs never end before them.
        "published": {"max_steps": 10_000, "epochs": 10_000, "evaluate_every": 50, "log_every": 1},
    }
    tuned: ClassVar = {"digits": {"generator_width": 32, "width": 64, "epochs": 30}}

    settings: DCGANSettings

    def __init__(self, settings: DCGANSettings | None = None, **options: Any) -> None:
        super().__init__(settings, **options)
        s, shape = self.settings, self.image_shape
        if s.generator == "capsule":
            self.generator = ImagesOnly(self.noise_dim, *shape, width=s.width)
        else:
            kind = UpsamplingGenerator if s.generator == "code" else TransposedGenerator
            self.generator = kind(self.noise_dim, shape.channels, shape.size, width=s.generator_width)
        self.discriminator = self.make_discriminator()
        self.stabilise()
        self.optimizers = {
            name: adam(network.parameters(), s.learning_rate, ADAM_BETAS)
            for name, network in (("discriminator", self.discriminator), ("generator", self.generator))
        }

    @property
    def noise_dim(self) -> int:
        """Normal values in a latent vector: by default as published with the generator."""
        return self.settings.noise_dim or (28 if self.settings.generator == "text" else 100)

    def make_discriminator(self) -> torch.nn.Module:
        """Images → logits."""
        shape = self.image_shape
        return ConvolutionalDiscriminator(shape.channels, shape.size, width=self.settings.width)


class ImagesOnly(CapsuleGenerator):
    """A capsule generator that returns its images without its capsules."""

    def forward(self, latent: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(latent)[0]
