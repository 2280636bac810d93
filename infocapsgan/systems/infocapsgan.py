"""InfoCapsGAN: a capsule generator and a capsule discriminator that share a class code.

The code given to the generator must be recognised by the discriminator's class capsules on the generated
image. On a real image the longest class capsule is then its cluster: MNIST digits told apart without labels.
Source: the public InfoCapsGAN code; its settings are the recipe `published`, its bugs mended.

The recipe `tuned` first finds the classes on real images alone (warm_up): predictions are certain, evenly
used over the classes (IMSAT), and the same for an image and a moved copy of it with a part erased. Slant and
size, along which classes would else divide, are what the copies change. Once classes have formed
(smoothness_after), the worst small change of an image must not leave its class either: rare forms of a digit
that had joined another come back. Then the generator comes in. From the first step on it
would disturb the classes: they form around its early, arbitrary images. A small weight of the code leaves it
to the real images what a class is; a large one is satisfied by images that are no digits. Without batch norm
the discriminator sees real and generated images on one scale, so the generator must match their contrast.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import capsops
from capsops.nn import RoutingCapsules
from infocapsgan import losses
from infocapsgan.data import Dataset
from infocapsgan.data.augment import erased, moved
from infocapsgan.data.dataset import to_symmetric
from infocapsgan.draw import Draw
from infocapsgan.metrics import clustering_metrics, kmeans_accuracy
from infocapsgan.models.capsule_encoder import CapsuleEncoder, Capsules, lengths
from infocapsgan.models.capsule_generator import CapsuleGenerator
from infocapsgan.settings import Count, Share, Weight, Whole
from infocapsgan.systems.gan import ADAM_BETAS, GAN, GANSettings
from infocapsgan.training import Training

LAST_DIM = 52  # numbers in the discriminator's last capsule
SAMPLES_PER_CODE = 10


@dataclass(frozen=True, kw_only=True)
class InfoCapsGANSettings(GANSettings):
    """InfoCapsGAN: capsule generator, capsule discriminator, class code; classifies without labels."""

    noise_dim: Count = 52
    """Normal values in a latent vector, beside the class code."""
    latent: Literal["plain", "squashed"] = "plain"
    """Whether noise and code are squashed to one vector of length below 1 (published)."""
    generator_rate: Weight = 1e-3
    """Learning rate of the generator."""
    discriminator_rate: Weight = 1e-3
    """Learning rate of the discriminator."""
    settled_rate: Share = 0.2
    """The encoder's rate falls in a straight line, over the warm-up, to this share of the discriminator's."""
    adversarial_weight: Weight = 1.0
    """Weight of real against generated; 0 trains the discriminator on real images alone, no generator."""
    warm_up: Whole = 500
    """Steps on real images alone, before the generator comes in."""
    code_weight: Weight = 0.003
    """Weight of the margin loss, summed over the batch, that recognises the code of generated images."""
    information_weight: Weight = 0.3
    """Weight of the mutual information between real images and their classes (IMSAT, IIC)."""
    balance: Weight = 4.0
    """How much even use of the classes counts in it, against certainty about each image."""
    consistency_weight: Weight = 1.0
    """Weight of: a real image and a moved copy of it belong to the same class."""
    erased: Share = 0.5
    """Height and width of what is erased from that copy, at most, as a share of the image's."""
    smoothness_weight: Weight = 1.0
    """Weight of: the worst small change of a real image leaves its class (virtual adversarial training)."""
    smoothness_radius: Weight = 4.0
    """Length of that change, in units of pixels in [−1, 1]."""
    smoothness_after: Whole = 250
    """Steps before that weight counts: classes form faster without it. It ends with the warm-up."""
    temperature: Weight = 20.0
    """Class probabilities of a real image are the softmax of this times its class capsules' lengths."""
    batch_norm: bool = False
    """Whether the discriminator normalises after its first convolution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frechet_samples and not self.adversarial_weight:
            raise ValueError("--frechet-samples: takes 0 with --adversarial-weight 0, without a generator")


class Verdict(NamedTuple):
    """What the discriminator says of images."""

    logit: Tensor  # [B], above 0 for real
    last: Tensor  # [B, 52], the capsule that the logit is read from
    capsules: Capsules


class Discriminator(nn.Module):
    """Capsule encoder, each class capsule times (1 + its length) → one capsule of 52 → real or generated."""

    def __init__(self, channels: int, size: int, classes: int, *, width: int, batch_norm: bool) -> None:
        super().__init__()
        self.encoder = CapsuleEncoder(channels, size, classes, width=width, batch_norm=batch_norm, bias=False)
        self.last = RoutingCapsules(classes, 1, 16, LAST_DIM, iterations=0, bias=False)
        self.verdict = nn.Linear(LAST_DIM, 1)

    def forward(self, images: Tensor) -> Verdict:
        capsules = self.encoder(images)
        weighted = capsules.classes * (1 + lengths(capsules.classes).unsqueeze(-1))
        last = self.last(weighted).flatten(1)
        return Verdict(self.verdict(last).flatten(), last, capsules)


class InfoCapsGAN(GAN):
    """InfoCapsGAN; see the module."""

    Settings = InfoCapsGANSettings
    recipes: ClassVar = {
        "tuned": {"ema": 0.98},
        "published": {
            "batch_size": 100,
            "latent": "squashed",
            "generator_rate": 2e-4,
            "discriminator_rate": 2e-5,
            "information_weight": 0.0,
            "consistency_weight": 0.0,
            "smoothness_weight": 0.0,
            "settled_rate": 1.0,
            "batch_norm": True,
            "warm_up": 0,
            "code_weight": 0.01,
        },
    }
    tuned: ClassVar = {"digits": {"width": 32, "epochs": 60, "warm_up": 260, "smoothness_after": 150}}
    headline = "unsupervised_accuracy"

    def __init__(self, settings: Settings | None = None, **options) -> None:
        super().__init__(settings, **options)
        s, shape = self.settings, self.image_shape
        self.generator = CapsuleGenerator(s.noise_dim + shape.classes, *shape, width=s.width)
        self.discriminator = Discriminator(*shape, width=s.width, batch_norm=s.batch_norm)
        if s.recipe == "published":
            self.apply(initialise_as_published)
        self.stabilise()
        encoder = set(self.discriminator.encoder.parameters())
        verdict = [weight for weight in self.discriminator.parameters() if weight not in encoder]
        self.optimizers = {
            "discriminator": torch.optim.Adam(
                [{"params": list(self.discriminator.encoder.parameters())}, {"params": verdict}],
                s.discriminator_rate,
                ADAM_BETAS,
            ),
            "generator": torch.optim.Adam(self.generator.parameters(), s.generator_rate, ADAM_BETAS),
        }

    @property
    def networks(self) -> list[nn.Module]:
        """Generator and encoder. What stands behind that gets no gradient in the warm-up, not one of 0."""
        return [self.generator, self.discriminator.encoder]

    def logits(self, images: Tensor) -> Tensor:
        """The discriminator's logits [B] of images [B, C, H, W] in [−1, 1]: above 0 for real."""
        return self.discriminator(images).logit

    def latent(self, noise: Tensor, code: Tensor) -> Tensor:
        """Noise [B, noise_dim] and class codes [B] → latent vectors [B, noise_dim + classes]."""
        latent = torch.cat([noise, F.one_hot(code, self.image_shape.classes)], dim=1)
        return capsops.squash(latent) if self.settings.latent == "squashed" else latent

    def class_log_probabilities(self, capsules: Capsules) -> Tensor:
        """log softmax(temperature · ‖v_j‖) over the classes [B, J]."""
        return F.log_softmax(self.settings.temperature * lengths(capsules.classes).float(), dim=1)

    def step(self, images: Tensor, labels: Tensor, training: Training) -> dict[str, Tensor]:
        """Discriminator and generator once each; the labels are not looked at."""
        s, draw, B = self.settings, training.draw, len(images)
        real = to_symmetric(images)
        noise, code = draw.normal(B, s.noise_dim), draw.integers(self.image_shape.classes, B)
        generating = s.adversarial_weight > 0 and training.step >= s.warm_up
        named = {}
        self.set_encoder_rate(training)

        with training.autocast():
            seen = self.discriminator(real)
            loss = self.real_images_loss(real, seen, training, named)
            if generating:
                generated, _ = self.generator(self.latent(noise, code))
                judged = self.discriminator(generated.detach())
                named["discriminator"] = self.adversarial_discriminator_loss(
                    real, generated, seen.logit, judged.logit, training
                )
                named["code"] = self.code_loss(judged, code)
                loss = loss + s.adversarial_weight * named["discriminator"]
                loss = loss + s.code_weight * s.batch_size * named["code"]
        training.update("discriminator", loss)

        if generating:
            with training.autocast():
                judged = self.discriminator(generated)
                named["generator"] = self.adversarial_generator_loss(judged.logit)
                loss = s.adversarial_weight * named["generator"]
                loss = loss + s.code_weight * s.batch_size * self.code_loss(judged, code)
            training.update("generator", loss)
            self.update_average()
        return {name: value.detach() for name, value in named.items()}

    def set_encoder_rate(self, training: Training) -> None:
        """The encoder's learning rate on its line from the first step to the end of the warm-up."""
        s = self.settings
        done = min(1.0, training.step / s.warm_up) if s.warm_up else 1.0
        rate = s.discriminator_rate * (1 - (1 - s.settled_rate) * done)
        self.optimizers["discriminator"].param_groups[0]["lr"] = rate

    def code_loss(self, judged: Verdict, code: Tensor) -> Tensor:
        """How badly the class capsules' lengths tell the code that the generator was given."""
        target = F.one_hot(code, self.image_shape.classes)
        return losses.margin_loss(lengths(judged.capsules.classes), target).mean()

    def real_images_loss(
        self, real: Tensor, seen: Verdict, training: Training, named: dict[str, Tensor]
    ) -> Tensor:
        """What real images alone say of the classes: certain, evenly used, the same for a moved copy."""
        s, loss = self.settings, torch.zeros((), device=real.device)
        log_p = self.class_log_probabilities(seen.capsules)
        p = log_p.exp()
        if s.information_weight:
            mean = training.processes.mean
            named["information"] = losses.mutual_information(p, mean=mean)
            balanced = losses.mutual_information(p, balance=s.balance, mean=mean)
            loss = loss - s.information_weight * balanced
        if s.consistency_weight:
            copy = erased(
                moved(real, training.draw, background=-1), training.draw, share=s.erased, background=-1
            )
            copy = self.discriminator(copy)
            named["consistency"] = losses.divergence(p.detach(), self.class_log_probabilities(copy.capsules))
            loss = loss + s.consistency_weight * named["consistency"]
        alone = not s.adversarial_weight or training.step < s.warm_up
        if s.smoothness_weight and alone and training.step >= s.smoothness_after:
            named["smoothness"] = losses.adversarial_smoothness(
                lambda x: self.class_log_probabilities(self.discriminator(x).capsules),
                real,
                p,
                training.draw,
                radius=s.smoothness_radius,
            )
            loss = loss + s.smoothness_weight * named["smoothness"]
        return loss

    def clusters(self, images: Tensor) -> Tensor:
        """The longest class capsule of each image [N], of images [N, C, H, W] as uint8."""
        found = [self.discriminator(to_symmetric(part)).capsules.classes for part in images.split(500)]
        return lengths(torch.cat(found)).argmax(dim=1)

    def random_latents(self, number: int, draw: Draw, images: Tensor) -> Tensor:
        """Latents of normal noise and evenly drawn class codes [number, noise_dim + classes]."""
        noise = draw.normal(number, self.settings.noise_dim)
        return self.latent(noise, draw.integers(self.image_shape.classes, number))

    def samples(self) -> tuple[Tensor, Capsules]:
        """Generated images in [−1, 1], a row for each code, and their capsules; always of the same noise."""
        s, classes = self.settings, self.image_shape.classes
        noise = torch.randn(SAMPLES_PER_CODE, s.noise_dim, generator=torch.Generator().manual_seed(0))
        code = torch.arange(classes).repeat_interleave(SAMPLES_PER_CODE)
        return self.drawing_generator(self.latent(noise.repeat(classes, 1), code).to(self.device))

    def evaluate(self, dataset: Dataset) -> dict[str, float]:
        """Unsupervised accuracy, NMI, ARI; sizes of the clusters; generator and discriminator compared."""
        classes = self.image_shape.classes
        train, test = self.clusters(dataset.train_images), self.clusters(dataset.test_images)
        metrics = clustering_metrics(train, dataset.train_labels, test, dataset.test_labels, classes)
        shares = torch.bincount(test, minlength=classes) / len(test)
        metrics |= {f"share_of_cluster_{j}": share for j, share in enumerate(shares.tolist())}
        if self.settings.adversarial_weight:
            images, given = self.samples()
            metrics |= compare_capsules(given, self.discriminator(images).capsules)
        return metrics

    def baselines(self, dataset: Dataset) -> dict[str, float]:
        """k-means on the pixels."""
        return {"k-means on pixels": kmeans_accuracy(dataset, self.image_shape.classes)}

    def pictures(self, dataset: Dataset) -> dict[str, tuple[Tensor, int]]:
        """Samples, a row for each class code."""
        if not self.settings.adversarial_weight:
            return {}
        return {"samples": ((self.samples()[0] + 1) / 2, SAMPLES_PER_CODE)}


def compare_capsules(given: Capsules, seen: Capsules) -> dict[str, float]:
    """The generator's capsules of images against the discriminator's capsules of the same images.

    Returns:
        for both layers the mean Euclidean distance and the mean cosine similarity; and the mean length of the
        discriminator's class capsules.
    """
    metrics = {"class_capsule_length": lengths(seen.classes).mean().item()}
    for layer, a, b in zip(Capsules._fields, given, seen, strict=True):
        metrics[f"{layer}_distance"] = (a - b).norm(dim=-1).mean().item()
        metrics[f"{layer}_cosine"] = F.cosine_similarity(a, b, dim=-1).mean().item()
    return metrics


def initialise_as_published(module: nn.Module) -> None:
    """Convolutions Xavier normal; transformations normal × √(3 / (K + D + J)), the last × √(2 / (K + D))."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_normal_(module.weight)
    if isinstance(module, RoutingCapsules):
        _, J, D, K = module.weight.shape
        nn.init.normal_(module.weight, std=math.sqrt(2 / (K + D) if J == 1 else 3 / (K + D + J)))
