"""Mimic: the capsule generator draws what the discriminator saw in a real image.

Its latent is the discriminator's last capsule of that image; only the adversarial loss trains it.
Source: the other branch of the public InfoCapsGAN code.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import capsops
from infocapsgan.data import Dataset
from infocapsgan.data.dataset import to_symmetric
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.settings import Weight
from infocapsgan.engine.train_state import TrainState
from infocapsgan.models.capsule_generator import CapsuleGenerator
from infocapsgan.systems.gan import ADAM_BETAS, GAN, GANSettings
from infocapsgan.systems.infocapsgan import LAST_DIM, Discriminator, initialise_as_published


@dataclass(frozen=True, kw_only=True)
class MimicSettings(GANSettings):
    """Mimic: the generator's input is the discriminator's last capsule of a real image."""

    noise_epochs: Weight = 2.0
    """Epochs, at first, in which the latents are squashed normal values instead."""
    generator_rate: Weight = 1e-3
    """Learning rate of the generator."""
    discriminator_rate: Weight = 1e-3
    """Learning rate of the discriminator."""
    batch_norm: bool = False
    """Whether the discriminator normalises after its first convolution."""


class Mimic(GAN):
    """Mimic; see the module."""

    Settings = MimicSettings
    recipes: ClassVar = {
        "tuned": {},
        "published": {
            "batch_size": 100,
            "generator_rate": 2e-4,
            "discriminator_rate": 2e-5,
            "batch_norm": True,
        },
    }
    tuned: ClassVar = {"digits": {"width": 32, "epochs": 30}}
    headline = "discriminator_accuracy"

    def __init__(self, settings: Settings | None = None, **options) -> None:
        super().__init__(settings, **options)
        s, shape = self.settings, self.image_shape
        self.generator = CapsuleGenerator(LAST_DIM, *shape, width=s.width)
        self.discriminator = Discriminator(*shape, width=s.width, batch_norm=s.batch_norm)
        if s.recipe == "published":
            self.apply(initialise_as_published)
        self.stabilise()
        self.optimizers = {
            "discriminator": torch.optim.Adam(
                self.discriminator.parameters(), s.discriminator_rate, ADAM_BETAS
            ),
            "generator": torch.optim.Adam(self.generator.parameters(), s.generator_rate, ADAM_BETAS),
        }

    def logits(self, images: Tensor) -> Tensor:
        """The discriminator's logits [B] of images [B, C, H, W] in [−1, 1]: above 0 for real."""
        return self.discriminator(images).logit

    def step(self, images: Tensor, labels: Tensor, state: TrainState) -> dict[str, Tensor]:
        """Discriminator and generator once each; the labels are not looked at."""
        real = to_symmetric(images)
        noise = state.rng.normal(len(images), LAST_DIM)

        with state.autocast():
            seen = self.discriminator(real)
            noisy = state.epoch < self.settings.noise_epochs
            generated, _ = self.generator(capsops.squash(noise) if noisy else seen.last.detach())
            logit = self.logits(generated.detach())
            discriminator = self.adversarial_discriminator_loss(real, generated, seen.logit, logit, state)
        state.update("discriminator", discriminator)

        with state.autocast():
            generator = self.adversarial_generator_loss(self.logits(generated))
        state.update("generator", generator)
        self.update_average()
        return {
            "discriminator": discriminator.detach(),
            "generator": generator.detach(),
            "real_accuracy": (seen.logit > 0).float().mean(),
            "generated_accuracy": (logit < 0).float().mean(),
            "squared_error": squared_error(generated.detach(), real),
        }

    def random_latents(self, number: int, rng: ShardedGenerator, images: Tensor) -> Tensor:
        """The discriminator's last capsule of `number` of the real images [number, 52]."""
        chosen = images[rng.integers(len(images), number)]
        return torch.cat([self.discriminator(to_symmetric(part)).last for part in chosen.split(500)])

    def mimicked(self, images: Tensor) -> Tensor:
        """What the generator draws of images [B, C, H, W] in [−1, 1]."""
        return self.sampling_generator(self.discriminator(images).last)[0]

    def evaluate(self, dataset: Dataset) -> dict[str, float]:
        """On up to 1,000 test images: how often the discriminator is right, how far the copies are off."""
        real_right, generated_right, errors = [], [], []
        for part in dataset.test_images[:1000].split(250):
            real = to_symmetric(part)
            copies = self.mimicked(real)
            real_right.append(self.logits(real) > 0)
            generated_right.append(self.logits(copies) < 0)
            errors.append(squared_error(copies, real) * len(real))
        shares = [torch.cat(right).float().mean().item() for right in (real_right, generated_right)]
        return {
            "discriminator_accuracy": sum(shares) / 2,
            "real_accuracy": shares[0],
            "generated_accuracy": shares[1],
            "squared_error": sum(errors).item() / len(dataset.test_images[:1000]),
        }

    def baselines(self, dataset: Dataset) -> dict[str, float]:
        """A discriminator that cannot tell."""
        return {"cannot tell": 0.5}

    def pictures(self, dataset: Dataset) -> dict[str, tuple[Tensor, int]]:
        """Five times, if there are as many: ten test images, and below them their copies."""
        columns = min(10, len(dataset.test_images))
        rows = min(5, len(dataset.test_images) // columns)
        real = to_symmetric(dataset.test_images[: rows * columns])
        both = torch.stack(
            [images.unflatten(0, (rows, columns)) for images in (real, self.mimicked(real))], dim=1
        )
        return {"copies": ((both.flatten(0, 2) + 1) / 2, columns)}


def squared_error(copies: Tensor, real: Tensor) -> Tensor:
    """Squared error of images in [−1, 1], as pixels in [0, 1], summed over an image; the batch's mean."""
    return ((copies.float() - real) / 2).square().flatten(1).sum(dim=1).mean()
