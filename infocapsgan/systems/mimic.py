"""Mimic: the capsule generator draws what the discriminator saw in a real image.

Its latent is the discriminator's last capsule of that image; only the adversarial loss trains it.
Source: the other branch of the public InfoCapsGAN code.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Adam

import capsops
from infocapsgan.data.dataset import Dataset, in_batches, to_symmetric, to_unit
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.settings import Weight
from infocapsgan.engine.train_state import TrainState
from infocapsgan.models.capsule_generator import CapsuleGenerator
from infocapsgan.plotting.sheet import Sheet
from infocapsgan.systems.gan import ADAM_BETAS, GAN, GANSettings, accuracies
from infocapsgan.systems.infocapsgan import COMMON, LAST_DIM, Discriminator, initialise_as_published
from infocapsgan.systems.system import CapsuleSystem, NotApplicableError


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


class Mimic(CapsuleSystem, GAN, name="mimic"):
    """Mimic; see the module."""

    Settings = MimicSettings
    recipes: ClassVar = {"tuned": {}, "published": COMMON}
    tuned: ClassVar = {"digits": {"width": 32, "epochs": 30}}
    settings: MimicSettings
    discriminator: Discriminator

    def __init__(self, settings: MimicSettings | None = None, **options: Any) -> None:
        super().__init__(settings, **options)
        s, shape = self.settings, self.image_shape
        self.generator = CapsuleGenerator(LAST_DIM, *shape, width=s.width)
        self.discriminator = Discriminator(*shape, width=s.width, batch_norm=s.batch_norm)
        if s.recipe == "published":
            self.apply(initialise_as_published)
        self.stabilise()
        weights = self.discriminator.parameters()
        self.optimizers["discriminator"] = Adam(weights, s.discriminator_rate, ADAM_BETAS)
        self.optimizers["generator"] = Adam(self.generator.parameters(), s.generator_rate, ADAM_BETAS)

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
        named = {"discriminator": discriminator.detach(), "generator": generator.detach()}
        error = squared_error(generated.detach(), real)
        return named | accuracies(seen.logit, logit) | {"squared_error": error}

    def random_latents(self, number: int, rng: ShardedGenerator, **options: Any) -> Tensor:
        """The discriminator's last capsule of `number` of the real `images` [number, 52]."""
        if (images := options.get("images")) is None:
            raise NotApplicableError("latents of mimic are made from real images: reconstruct() takes them")
        chosen = images[rng.integers(len(images), number)]
        return in_batches(lambda part: self.discriminator(to_symmetric(part)).last, chosen)

    def copied(self, images: Tensor) -> Tensor:
        """What the generator makes of images [B, C, H, W] in [−1, 1], in that range, too."""
        return self.sampling_generator(self.discriminator(images).last)[0]

    def reconstruct(self, images: Tensor) -> Tensor:
        """What the generator makes of the discriminator's last capsule of each image."""
        return (self.copied(to_symmetric(images)).float() + 1) / 2

    def evaluate(self, dataset: Dataset) -> dict[str, float]:
        """On up to 1,000 test images: how often the discriminator is right, the copies' squared error."""
        images = to_symmetric(dataset.test_images[:1000])
        pairs = [(real, self.copied(real)) for real in images.split(250)]
        errors = [squared_error(copies, real) * len(real) for real, copies in pairs]
        error = torch.stack(errors).sum().item() / len(images)
        return self.discriminator_metrics(pairs) | {"squared_error": error}

    def pictures(self, dataset: Dataset) -> dict[str, Sheet]:
        """Five times, if there are as many: ten test images, and below them their copies."""
        columns = min(10, len(dataset.test_images))
        rows = min(5, len(dataset.test_images) // columns)
        real = dataset.test_images[: rows * columns]
        both = [part.unflatten(0, (rows, columns)) for part in (to_unit(real), self.reconstruct(real))]
        images = torch.stack(both, dim=1).flatten(0, 2)
        return {"copies": Sheet(images, columns, ["image", "copy"] * rows)}


def squared_error(copies: Tensor, real: Tensor) -> Tensor:
    """Squared error of images in [−1, 1], as pixels in [0, 1], summed over an image; the batch's mean."""
    return ((copies.float() - real) / 2).square().flatten(1).sum(dim=1).mean()
