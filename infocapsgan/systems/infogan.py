"""InfoGAN: a GAN whose latent codes must be recognised on the generated image.

Source: Chen et al. 2016, networks of appendix C.1; loss weights and sizes of a public implementation.

The recipe `tuned` first learns the classes from real images (class_code.py), with an optimiser of its own for
trunk and recogniser. These have no batch norm: its statistics would be those of augmented, real and generated
images in turn. What the continuous codes mean is open as published. Copies of real images settle it
(meaning_weight): the first code is to grow with the slant of strokes, the second with their width.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infocapsgan.data.augment import shear, thicken
from infocapsgan.data.dataset import Dataset, to_symmetric
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.settings import Count, Range, Weight, Whole
from infocapsgan.engine.train_state import TrainState, adam
from infocapsgan.models.infogan import InfoGANGenerator, InfoGANTrunk
from infocapsgan.plotting.sheet import Sheet
from infocapsgan.systems.class_code import GENERATED, SAMPLES_PER_CODE, SHORT, ClassCodeGAN, ClassCodeSettings
from infocapsgan.systems.gan import ADAM_BETAS, accuracies

LEAN, THICKNESS = 0.5, 1.0  # of copies, where a continuous code is to change by 1


@dataclass(frozen=True, kw_only=True)
class InfoGANSettings(ClassCodeSettings):
    """InfoGAN: a GAN with categorical codes, the first of which is the class, and continuous codes."""

    batch_size: Count | None = 256
    """Images per step, over all processes."""
    epochs: Count | None = 50
    """Passes over the training images."""
    width: Annotated[int, Range(8)] = 64
    """Channels of the first convolution; the next has twice as many, the dense layer 16 times."""
    noise_dim: Count = 62
    """Normal values in a latent vector, beside the codes."""
    categorical_codes: Count = 1
    """One-hot codes in a latent vector; the first is the class code (published: SVHN 4, CelebA 10)."""
    values: Annotated[int, Range(2)] | None = None
    """Values of each categorical code [as many as there are classes]."""
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


class InfoGANDiscriminator(nn.Module):
    """A trunk with two ends: real or generated, and the codes, each categorical one of so many `values`."""

    def __init__(self, channels: int, size: int, values: int, settings: InfoGANSettings) -> None:
        super().__init__()
        width, batch_norm = settings.width, settings.batch_norm
        self.codes, self.values = settings.categorical_codes, values
        self.trunk = InfoGANTrunk(channels, size, width=width, batch_norm=batch_norm)
        self.verdict = nn.Linear(16 * width, 1)
        self.recogniser = nn.Sequential(
            nn.Linear(16 * width, 2 * width),
            nn.BatchNorm1d(2 * width) if batch_norm else nn.Identity(),
            nn.LeakyReLU(0.1),
            nn.Linear(2 * width, self.codes * values + settings.continuous_codes),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images → logits [B], of the categorical codes [B, codes, values], and continuous codes [B, …]."""
        features = self.trunk(images)
        categorical, continuous = self.recogniser(features).tensor_split([self.codes * self.values], dim=1)
        categorical = categorical.unflatten(1, (self.codes, self.values))
        return self.verdict(features).flatten(), categorical, continuous


class InfoGAN(ClassCodeGAN, name="infogan"):
    """InfoGAN; see the module."""

    Settings = InfoGANSettings
    recipes: ClassVar = {"tuned": {"batch_size": 128, "batch_norm": False}, "published": GENERATED}
    datasets: ClassVar = {"cifar10": {"noise_dim": 64, "continuous_weight": 1.0, "epochs": 150}}
    tuned: ClassVar = {
        "digits": SHORT | {"width": 16, "epochs": 80},
        "mnist": {"warm_up": 1000, "meaning_weight": 0.5},
        "fashion-mnist": {"warm_up": 1000},
    }
    settings: InfoGANSettings
    discriminator: InfoGANDiscriminator

    def __init__(self, settings: InfoGANSettings | None = None, **options: Any) -> None:
        super().__init__(settings, **options)
        s, (channels, size, _) = self.settings, self.image_shape
        latent_dim = s.noise_dim + s.categorical_codes * self.codes + s.continuous_codes
        self.generator = InfoGANGenerator(latent_dim, channels, size, width=s.width)
        self.discriminator = network = InfoGANDiscriminator(channels, size, self.codes, s)
        self.stabilise()
        parts = network.trunk, network.verdict, network.recogniser
        trunk, verdict, recogniser = ([*part.parameters()] for part in parts)
        self.optimizers["discriminator"] = adam(trunk + verdict, s.discriminator_rate, ADAM_BETAS)
        generating = [*self.generator.parameters(), *recogniser]
        self.optimizers["generator"] = adam(generating, s.generator_rate, ADAM_BETAS)
        if s.learns_of_real_images or (s.meaning_weight and s.continuous_codes):
            self.optimizers["classes"] = adam(trunk + recogniser, s.classes_rate, ADAM_BETAS)

    def class_logits(self, images: Tensor) -> Tensor:
        """Logits of the first categorical code [B, values], of images [B, C, H, W] in [−1, 1]."""
        return self.discriminator(images)[1][:, 0]

    @property
    def codes(self) -> int:
        """How many values each categorical code has."""
        return self.settings.values or self.image_shape.classes

    def latents(self, noise: Tensor, code: Tensor | None = None, continuous: Tensor | None = None) -> Tensor:
        """Noise [B, noise_dim], categorical codes and continuous codes [B, …] → latent vectors.

        Categorical codes are [B, categorical_codes], or [B], the class code; those not mentioned are 0.
        Without continuous codes these are 0, the middle of their range.
        """
        s, B = self.settings, len(noise)
        codes = torch.zeros(B, s.categorical_codes, dtype=torch.long, device=noise.device)
        if code is not None:
            codes[:, : 1 if code.dim() == 1 else None] = code.view(B, -1)
        if continuous is None:
            continuous = noise.new_zeros(B, s.continuous_codes)
        return torch.cat([noise, F.one_hot(codes, self.codes).flatten(1), continuous], dim=1)

    def step(self, images: Tensor, labels: Tensor, state: TrainState) -> dict[str, Tensor]:
        """What real images say of classes and codes, after the warm-up the two networks; no label is seen."""
        s, real = self.settings, to_symmetric(images)
        named: dict[str, Tensor] = {}
        if "classes" in self.optimizers:
            self.optimizers["classes"].param_groups[0]["lr"] = self.decayed_rate(s.classes_rate, state)
            with state.autocast():
                _, categories, values = self.discriminator(real)
                loss = self.class_loss(real, categories[:, 0], state, named)
                if s.meaning_weight and s.continuous_codes:
                    named["meaning"] = self.meaning_loss(real, values, state.rng)
                    loss = loss + s.meaning_weight * named["meaning"]
            state.update("classes", loss)
        if not self.generates(state):
            return {name: value.detach() for name, value in named.items()}

        noise, code, continuous = self.random_parts(len(real), state.rng)
        with state.autocast():
            generated = self.generator(self.latents(noise, code, continuous))
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
        named |= {"discriminator": discriminator, "generator": generator}
        named |= {"categorical": categorical, "continuous": squared} | accuracies(real_logit, logit)
        return {name: value.detach() for name, value in named.items()}

    def information_loss(
        self, categories: Tensor, code: Tensor, values: Tensor, continuous: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted sum, the cross-entropy of the categorical codes, the others' squared error."""
        s = self.settings
        categorical = F.cross_entropy(categories.float().flatten(0, 1), code.flatten()) * s.categorical_codes
        squared = (values.float() - continuous).square().sum(dim=1).mean()
        return s.categorical_weight * categorical + s.continuous_weight * squared, categorical, squared

    def meaning_loss(self, real: Tensor, values: Tensor, rng: ShardedGenerator) -> Tensor:
        """Squared error of how the first two continuous codes Q change with slant and width of strokes.

        Σ_k (Q_k(copy) − Q_k(image) − a_k)², averaged over the batch, with amounts a_k even from −1 to 1: the
        copy leans by a_1 · LEAN more, its strokes are wider by a_2 · THICKNESS pixels; `values` are Q(image).
        """
        amounts = rng.uniform(len(real), 2) * 2 - 1
        copy = thicken(shear(real, amounts[:, 0] * LEAN, background=-1), amounts[:, 1] * THICKNESS)
        change = (self.discriminator(copy)[2].float() - values.float())[:, :2]
        return (change - amounts[:, : change.shape[1]]).square().sum(dim=1).mean()

    def random_parts(self, number: int, rng: ShardedGenerator) -> tuple[Tensor, Tensor, Tensor]:
        """Normal noise, evenly distributed categorical codes and continuous codes of latent vectors."""
        s = self.settings
        noise, code = rng.normal(number, s.noise_dim), rng.integers(self.codes, number, s.categorical_codes)
        return noise, code, rng.uniform(number, s.continuous_codes) * 2 - 1

    def random_latents(self, number: int, rng: ShardedGenerator, **codes: Any) -> Tensor:
        """Latent vectors [number, …] of such parts."""
        noise, categorical, continuous = self.random_parts(number, rng)
        if "code" in codes:
            categorical[:, 0] = codes["code"]
        return self.latents(noise, categorical, codes.get("continuous", continuous))

    def pictures(self, dataset: Dataset) -> dict[str, Sheet]:
        """Samples, a row for each class; for each other code rows along which only that code changes."""
        s, columns, sheets = self.settings, SAMPLES_PER_CODE, super().pictures(dataset)
        noise, code = self.fixed_latents(columns), torch.arange(self.codes, device=self.device)
        same, rows = noise[:1].expand(self.codes * columns, -1), code.repeat_interleave(columns)
        values = torch.linspace(-2, 2, columns)
        heads = [f"{value:.1f}" for value in values.tolist()]
        for index in range(s.continuous_codes):
            varied = same.new_zeros(len(same), s.continuous_codes)
            varied[:, index] = values.repeat(self.codes)
            xlabel = f"continuous code {index}, the noise is the same (in training from −1 to 1)"
            sheet = self.code_sheet(self.latents(same, rows, varied), heads=heads, xlabel=xlabel)
            sheets[f"continuous_code_{index}"] = sheet
        for index in range(1, s.categorical_codes):
            codes = rows.new_zeros(len(rows), s.categorical_codes)
            codes[:, index] = code.repeat(columns)
            images = self.generate(self.latents(noise.repeat_interleave(self.codes, dim=0), codes))
            labels = {"xlabel": f"categorical code {index}", "ylabel": "a row for each noise vector"}
            heads = [str(value) for value in range(self.codes)]
            sheets[f"categorical_code_{index}"] = Sheet(images, self.codes, heads=heads, **labels)
        return sheets
