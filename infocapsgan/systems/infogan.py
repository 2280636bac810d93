"""InfoGAN: a GAN whose latent codes must be recognised on the generated image.

Source: Chen et al. 2016, networks of appendix C.1; loss weights and sizes of a public implementation.

The recipe `tuned` finds the classes on real images first (class_code.py), by an optimiser of its own for
trunk and recogniser. These have no batch norm: its statistics would be those of moved, real and generated
images in turn, and a discriminator that sees each on a scale of its own cannot tell how bright they are.

What the continuous codes mean is open as published: whatever varies most, at times the same twice. Copies of
real images settle it (meaning_weight): where strokes lean more, the first code is to be higher, where they
are wider the second, each by as much as the copy was changed, and neither with the other.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infocapsgan.data import Dataset
from infocapsgan.data.augment import shear, thicken
from infocapsgan.data.dataset import to_symmetric
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.settings import Count, Range, Weight, Whole
from infocapsgan.engine.train_state import TrainState, adam
from infocapsgan.models.infogan import InfoGANGenerator, InfoGANTrunk
from infocapsgan.systems.class_code import NO_REAL_IMAGES, ClassCodeGAN, ClassCodeSettings
from infocapsgan.systems.gan import ADAM_BETAS

LEAN, THICKNESS = 0.5, 1.0  # of copies, where a continuous code is to change by 1


@dataclass(frozen=True, kw_only=True)
class InfoGANSettings(ClassCodeSettings):
    """InfoGAN: a GAN with a categorical code and continuous codes."""

    batch_size: Count | None = 256
    """Images per step, over all processes."""
    epochs: Count | None = 50
    """Passes over the training images."""
    width: Annotated[int, Range(8)] = 64
    """Channels of the first convolution; the next has twice as many, the dense layer 16 times."""
    noise_dim: Count = 62
    """Normal values in a latent vector, beside the codes."""
    continuous_codes: Whole = 2
    """Uniform values from −1 to 1 in a latent vector."""
    categorical_weight: Weight = 1.0
    """λ, the weight of the cross-entropy of the categorical code."""
    continuous_weight: Weight = 0.5
    """Weight of the squared error of the continuous codes."""
    discriminator_rate: Weight = 2e-4
    """Learning rate of the discriminator and of what it shares with the recogniser."""
    generator_rate: Weight = 1e-3
    """Learning rate of the generator and the recogniser."""
    classes_rate: Weight = 1e-3
    """Learning rate of trunk and recogniser, for what real images say of classes and codes."""
    batch_norm: bool = True
    """Whether discriminator and recogniser normalise."""
    meaning_weight: Weight = 0.0
    """Weight of: the first continuous code grows with slant, the second with the width of bright strokes."""

    @property
    def learns_of_copies(self) -> bool:
        """Whether real images say what continuous codes mean."""
        return bool(self.meaning_weight and self.continuous_codes)


class InfoGANDiscriminator(nn.Module):
    """A trunk with two ends: real or generated, and the codes.

    Args:
        channels, size: of the image.
        classes: of the categorical code.
        continuous: number of continuous codes.
        width: 64 as published.
        batch_norm: whether trunk and recogniser normalise, as published.
    """

    def __init__(
        self, channels: int, size: int, classes: int, continuous: int, *, width: int, batch_norm: bool = True
    ) -> None:
        super().__init__()
        self.classes = classes
        self.trunk = InfoGANTrunk(channels, size, width=width, batch_norm=batch_norm)
        self.verdict = nn.Linear(16 * width, 1)
        self.recogniser = nn.Sequential(
            nn.Linear(16 * width, 2 * width),
            nn.BatchNorm1d(2 * width) if batch_norm else nn.Identity(),
            nn.LeakyReLU(0.1),
            nn.Linear(2 * width, classes + continuous),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images → logits [B], logits of the categorical code [B, classes], continuous codes [B, …]."""
        features = self.trunk(images)
        codes = self.recogniser(features)
        return self.verdict(features).flatten(), codes[:, : self.classes], codes[:, self.classes :]


class InfoGAN(ClassCodeGAN):
    """InfoGAN; see the module."""

    Settings = InfoGANSettings
    recipes: ClassVar = {
        "tuned": {"batch_size": 128, "batch_norm": False},
        "published": NO_REAL_IMAGES,
    }
    datasets: ClassVar = {"cifar10": {"noise_dim": 64, "continuous_weight": 1.0, "epochs": 150}}
    tuned: ClassVar = {
        "digits": {"width": 16, "epochs": 80, "warm_up": 260, "smoothness_after": 150},
        "mnist": {"warm_up": 1000, "meaning_weight": 0.5},
        "fashion-mnist": {"warm_up": 1000},
    }

    def __init__(self, settings: Settings | None = None, **options) -> None:
        super().__init__(settings, **options)
        s, (channels, size, classes) = self.settings, self.image_shape
        self.generator = InfoGANGenerator(
            s.noise_dim + classes + s.continuous_codes, channels, size, width=s.width
        )
        self.discriminator = InfoGANDiscriminator(
            channels, size, classes, s.continuous_codes, width=s.width, batch_norm=s.batch_norm
        )
        self.stabilise()
        shared = [*self.discriminator.trunk.parameters(), *self.discriminator.verdict.parameters()]
        generating = [*self.generator.parameters(), *self.discriminator.recogniser.parameters()]
        self.optimizers = {
            "discriminator": adam(shared, s.discriminator_rate, ADAM_BETAS),
            "generator": adam(generating, s.generator_rate, ADAM_BETAS),
        }
        if s.learns_of_real_images or s.learns_of_copies:
            weights = [*self.discriminator.trunk.parameters(), *self.discriminator.recogniser.parameters()]
            self.optimizers["classes"] = adam(weights, s.classes_rate, ADAM_BETAS)

    def logits(self, images: Tensor) -> Tensor:
        """The discriminator's logits [B] of images [B, C, H, W] in [−1, 1]: above 0 for real."""
        return self.discriminator(images)[0]

    def class_logits(self, images: Tensor) -> Tensor:
        """Logits of the categorical code [B, classes], of images [B, C, H, W] in [−1, 1]."""
        return self.discriminator(images)[1]

    def latent(self, noise: Tensor, code: Tensor, continuous: Tensor | None = None) -> Tensor:
        """Noise [B, noise_dim], classes [B] and continuous codes [B, …] → latent vectors.

        Without continuous codes they are 0, the middle of their range.
        """
        if continuous is None:
            continuous = noise.new_zeros(len(noise), self.settings.continuous_codes)
        return torch.cat([noise, F.one_hot(code, self.image_shape.classes), continuous], dim=1)

    def step(self, images: Tensor, labels: Tensor, state: TrainState) -> dict[str, Tensor]:
        """What real images say of classes and codes, after the warm-up the two networks; no label is seen."""
        s, real, named = self.settings, to_symmetric(images), {}
        if "classes" in self.optimizers:
            self.optimizers["classes"].param_groups[0]["lr"] = self.decayed_rate(s.classes_rate, state)
            with state.autocast():
                _, categories, values = self.discriminator(real)
                loss = self.real_images_loss(real, categories, state, named)
                if s.learns_of_copies:
                    named["meaning"] = self.meaning_loss(real, values, state.rng)
                    loss = loss + s.meaning_weight * named["meaning"]
            state.update("classes", loss)
        if self.generates(state):
            named |= self.generator_step(real, state)
        return {name: value.detach() for name, value in named.items()}

    def generator_step(self, real: Tensor, state: TrainState) -> dict[str, Tensor]:
        """The discriminator once, then generator and recogniser once; returns named losses."""
        s, rng, B = self.settings, state.rng, len(real)
        noise, code = rng.normal(B, s.noise_dim), rng.integers(self.image_shape.classes, B)
        continuous = rng.uniform(B, s.continuous_codes) * 2 - 1

        with state.autocast():
            generated = self.generator(self.latent(noise, code, continuous))
            real_logit = self.logits(real)
            logit, categories, values = self.discriminator(generated.detach())
            discriminator = self.adversarial_discriminator_loss(real, generated, real_logit, logit, state)
            # The trunk is trained by the codes as well: without that, public versions learn no classes.
            information = self.information_loss(categories, code, values, continuous)[0]
        state.update("discriminator", discriminator + information)

        with state.autocast():
            later_logit, categories, values = self.discriminator(generated)
            generator = self.adversarial_generator_loss(later_logit)
            information, categorical, squared = self.information_loss(categories, code, values, continuous)
        state.update("generator", generator + information)
        self.update_average()
        return {
            "discriminator": discriminator,
            "generator": generator,
            "categorical": categorical,
            "continuous": squared,
            "real_accuracy": (real_logit > 0).float().mean(),
            "generated_accuracy": (logit < 0).float().mean(),
        }

    def information_loss(
        self, categories: Tensor, code: Tensor, values: Tensor, continuous: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted sum, the cross-entropy of the categorical code, the squared error of the others."""
        s = self.settings
        categorical = F.cross_entropy(categories.float(), code)
        squared = (values.float() - continuous).square().sum(dim=1).mean()
        return s.categorical_weight * categorical + s.continuous_weight * squared, categorical, squared

    def meaning_loss(self, real: Tensor, values: Tensor, rng: ShardedGenerator) -> Tensor:
        """Squared error of how the first two continuous codes change with slant and width of strokes.

        Σ_k (Q_k(copy) − Q_k(image) − a_k)², averaged over the batch, with amounts a_k even from −1 to 1: the
        copy of an image leans by a_1 · LEAN more, its strokes are wider by about a_2 · THICKNESS pixels.

        Args:
            real: images [B, C, H, W] in [−1, 1].
            values: continuous codes Q of these images [B, continuous_codes].
            rng: where the amounts come from.
        """
        amounts = rng.uniform(len(real), 2) * 2 - 1
        copy = shear(real, amounts[:, 0] * LEAN, background=-1)
        copy = thicken(copy, amounts[:, 1] * THICKNESS)
        change = (self.discriminator(copy)[2].float() - values.float())[:, :2]
        return (change - amounts[:, : change.shape[1]]).square().sum(dim=1).mean()

    def random_latents(self, number: int, rng: ShardedGenerator, images: Tensor) -> Tensor:
        """Latents of normal noise, evenly drawn classes and continuous codes."""
        s = self.settings
        return self.latent(
            rng.normal(number, s.noise_dim),
            rng.integers(self.image_shape.classes, number),
            rng.uniform(number, s.continuous_codes) * 2 - 1,
        )

    def traversal(self, index: int, values: Tensor, codes: Tensor, rng: ShardedGenerator) -> Tensor:
        """Latents of rows along which one continuous code goes through `values` and nothing else changes.

        Args:
            index: of the continuous code.
            values: that it takes along a row [V].
            codes: class of each row [R].
            rng: where the noise and the other continuous codes of each row come from.

        Returns:
            [R · V, latent], row by row.
        """
        R, V = len(codes), len(values)
        noise = rng.normal(R, self.settings.noise_dim).repeat_interleave(V, dim=0)
        continuous = rng.uniform(R, self.settings.continuous_codes) * 2 - 1
        continuous = continuous.repeat_interleave(V, dim=0)
        continuous[:, index] = values.repeat(R)
        return self.latent(noise, codes.repeat_interleave(V), continuous)

    def pictures(self, dataset: Dataset) -> dict[str, tuple[Tensor, int]]:
        """Samples, a row for each class; for each continuous code rows along which it goes from −2 to 2."""
        s, classes = self.settings, self.image_shape.classes
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(classes, s.noise_dim, generator=generator)
        code = torch.arange(classes).repeat_interleave(classes)
        still = torch.zeros(classes**2, s.continuous_codes)
        drawn = {"samples": self.latent(noise.repeat(classes, 1), code, still)}
        for index in range(s.continuous_codes):
            varied = still.clone()
            varied[:, index] = torch.linspace(-2, 2, classes).repeat(classes)
            drawn[f"continuous_code_{index}"] = self.latent(noise[:1].expand(classes**2, -1), code, varied)
        return {
            name: ((self.sampling_generator(latent.to(self.device)) + 1) / 2, classes)
            for name, latent in drawn.items()
        }
