"""DCGAN: CapsuleGAN's generator, losses and optimiser with a discriminator of convolutions, to compare with.

Source of the discriminator: Radford, Metz, Chintala 2016.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from infocapsgan.data.dataset import Dataset, to_symmetric
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.settings import Count, Weight
from infocapsgan.engine.train_state import TrainState, adam
from infocapsgan.models.capsule_generator import CapsuleGenerator
from infocapsgan.models.dcgan import ConvolutionalDiscriminator, TransposedGenerator, UpsamplingGenerator
from infocapsgan.plotting.sheet import Sheet
from infocapsgan.systems.gan import ADAM_BETAS, GAN, SAME_LATENTS, GANSettings, accuracies, morph


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


class DCGAN(GAN, name="dcgan"):
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
        for name in ("discriminator", "generator"):
            self.optimizers[name] = adam(getattr(self, name).parameters(), s.learning_rate, ADAM_BETAS)

    @property
    def noise_dim(self) -> int:
        """Normal values in a latent vector: by default as published with the generator."""
        return self.settings.noise_dim or (28 if self.settings.generator == "text" else 100)

    def make_discriminator(self) -> nn.Module:
        """Images → logits."""
        channels, size, _ = self.image_shape
        return ConvolutionalDiscriminator(channels, size, width=self.settings.width)

    def step(self, images: Tensor, labels: Tensor, state: TrainState) -> dict[str, Tensor]:
        """The discriminator once, then the generator once on new latents; labels are not looked at."""
        real = to_symmetric(images)
        latent, later_latent = (state.rng.normal(len(real), self.noise_dim) for _ in range(2))

        with state.autocast():
            with torch.no_grad():
                generated = self.generator(latent)
            real_logit, logit = self.logits(real), self.logits(generated)
            discriminator = self.adversarial_discriminator_loss(real, generated, real_logit, logit, state)
        state.update("discriminator", discriminator)

        with state.autocast():
            generator = self.adversarial_generator_loss(self.logits(self.generator(later_latent)))
        state.update("generator", generator)
        self.update_average()
        named = {"discriminator": discriminator.detach(), "generator": generator.detach()}
        return named | accuracies(real_logit, logit)

    def latents(self, noise: Tensor, code: Tensor | None = None, continuous: Tensor | None = None) -> Tensor:
        return noise

    def random_latents(self, number: int, rng: ShardedGenerator, **codes: Any) -> Tensor:
        return rng.normal(number, self.noise_dim)

    def evaluate(self, dataset: Dataset) -> dict[str, float]:
        """How often the discriminator is right on up to 1,000 test images and as many generated ones."""
        real = to_symmetric(dataset.test_images[:1000])
        generated = map(self.sampling_generator, self.fixed_latents(len(real)).split(250))
        return self.discriminator_metrics(zip(real.split(250), generated, strict=True))

    def pictures(self, dataset: Dataset) -> dict[str, Sheet]:
        """Samples of fixed latents; and rows that go in a straight line from one latent to another."""
        latents = self.fixed_latents(100)
        lines = torch.cat([morph(a, b, 10) for a, b in zip(latents[:10], latents[10:20], strict=True)])
        shares, along = [f"{n / 9:.1f}" for n in range(10)], "from one latent vector to another"
        return {
            "samples": Sheet(self.generate(latents), 10, xlabel=SAME_LATENTS),
            "morph": Sheet(self.generate(lines), 10, heads=shares, xlabel=along),
        }


class ImagesOnly(CapsuleGenerator):
    """A capsule generator that returns its images without its capsules."""

    def forward(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(latent)[0]
