"""What the generative adversarial systems have in common."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from infocapsgan import losses
from infocapsgan.data.dataset import Dataset, evenly, in_batches
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.settings import Range, Settings, Weight, Whole
from infocapsgan.engine.train_state import TrainState
from infocapsgan.metrics.features import feature_extractor
from infocapsgan.metrics.frechet_distance import frechet_distance
from infocapsgan.systems.system import System

ADAM_BETAS = (0.5, 0.999)  # of Radford, Metz, Chintala 2016, and of every system here
SAME_LATENTS = "generated images, of the same latent vectors at every step of training"


@dataclass(frozen=True, kw_only=True)
class GANSettings(Settings):
    """The options of all systems with a generator and a discriminator."""

    adversarial_loss: Literal["logistic", "hinge", "wasserstein"] = "logistic"
    """logistic: binary cross-entropy, non-saturating for the generator; wasserstein: with penalty."""
    penalty_weight: Weight = 10.0
    """Weight of the gradient penalty of wasserstein."""
    spectral_norm: bool = False
    """Whether the discriminator's convolutions and dense layers have spectral norm 1."""
    ema: Annotated[float, Range(0, 0.9999)] = 0.0
    """Pictures come from a moving average of the generator that keeps this much at each step; 0: none."""
    frechet_samples: Whole = 0
    """Images generated at each evaluation to log their Fréchet distance to test images; 0: not measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.frechet_samples < 100:
            raise ValueError(f"--frechet-samples: got {self.frechet_samples}, takes 0 or at least 100")
        if self.compile and self.adversarial_loss == "wasserstein":
            reason = "its penalty takes second derivatives, which compiled networks do not have"
            raise ValueError(f"--compile: cannot be combined with --adversarial-loss wasserstein: {reason}")


class GAN(System):
    """A system with a `generator`, a `discriminator`, and where asked for an average of the generator."""

    networks = ("generator", "discriminator")
    headline = "discriminator_accuracy"
    settings: GANSettings
    generator: nn.Module
    discriminator: nn.Module

    def stabilise(self) -> None:
        """Called once both networks are made: adds spectral norm and the average of the generator."""
        if self.settings.spectral_norm:
            for module in list(self.discriminator.modules()):
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    nn.utils.parametrizations.spectral_norm(module)
        ema = self.settings.ema
        self.average = copy.deepcopy(self.generator).requires_grad_(False) if ema else None

    @property
    def sampling_generator(self) -> nn.Module:
        """The generator that pictures and evaluations come from."""
        return self.average or self.generator

    def generate(self, latents: Tensor) -> Tensor:
        """Latent vectors [N, …] → images [N, C, H, W] in [0, 1]."""
        return (_first(self.sampling_generator(latents.to(self.device))).float() + 1) / 2

    def sample_quality(self, dataset: Dataset) -> dict[str, float]:
        """The Fréchet distance of --frechet-samples generated images to as many test images."""
        number = min(self.settings.frechet_samples, len(dataset.test_images))
        if not number:
            return {}
        classifier = feature_extractor(dataset, self.image_shape.classes).classifier
        latents = self.random_latents(number, ShardedGenerator(0, self.device), images=dataset.train_images)
        generated = classifier.of_all(in_batches(self.generate, latents))
        real = classifier.of_all(evenly(dataset.test_images, number))
        return {"frechet_distance": frechet_distance(real, generated)}

    def baselines(self, dataset: Dataset) -> dict[str, float]:
        """A discriminator that cannot tell real from generated."""
        return {"cannot tell": 0.5}

    @torch.no_grad()
    def update_average(self) -> None:
        """Moves the average a step towards the generator; called after each update of it."""
        if self.average is None:
            return
        for mean, now in zip(self.average.parameters(), self.generator.parameters(), strict=True):
            mean.lerp_(now, 1 - self.settings.ema)
        for old, new in zip(self.average.buffers(), self.generator.buffers(), strict=True):
            old.copy_(new)

    def adversarial_discriminator_loss(
        self, real: Tensor, generated: Tensor, real_logit: Tensor, logit: Tensor, state: TrainState
    ) -> Tensor:
        """The discriminator's loss of the chosen kind, with its gradient penalty where it has one."""
        s = self.settings
        loss = losses.discriminator_loss(real_logit, logit, s.adversarial_loss)
        if s.adversarial_loss == "wasserstein":
            penalty = losses.gradient_penalty(self.logits, real, generated.detach(), state.rng)
            loss = loss + s.penalty_weight * penalty
        return loss

    def adversarial_generator_loss(self, logit: Tensor) -> Tensor:
        """The generator's loss of the chosen kind."""
        return losses.generator_loss(logit, self.settings.adversarial_loss)

    def logits(self, images: Tensor) -> Tensor:
        """The discriminator's logits [B] of images [B, C, H, W] in [−1, 1]: above 0 for real."""
        return _first(self.discriminator(images))

    def fixed_latents(self, number: int) -> Tensor:
        """The same normal values [number, noise_dim] at every call."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(number, self.noise_dim, generator=generator).to(self.device)

    def discriminator_metrics(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """The accuracies on batches of real and of generated images, and their mean."""
        logits = [(self.logits(real), self.logits(generated)) for real, generated in pairs]
        shares = accuracies(*map(torch.cat, zip(*logits, strict=True)))
        metrics = {name: share.item() for name, share in shares.items()}
        return {"discriminator_accuracy": sum(metrics.values()) / 2, **metrics}


def _first(output: Any) -> Tensor:
    """The images or logits that a network returns, by themselves or before others of its results."""
    return output if isinstance(output, Tensor) else output[0]


def accuracies(real_logit: Tensor, logit: Tensor) -> dict[str, Tensor]:
    """The shares of real and of generated images that a discriminator is right about, of its logits [N]."""
    real, generated = (right.float().mean() for right in (real_logit > 0, logit < 0))
    return {"real_accuracy": real, "generated_accuracy": generated}


def morph(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Points [steps, N] on the straight line from `start` [N] to `end` [N], both included."""
    return torch.lerp(start, end, torch.linspace(0, 1, steps, device=start.device)[:, None])
