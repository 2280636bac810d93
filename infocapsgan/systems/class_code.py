"""What the systems with a class code have in common: they learn classes from real images without labels.

A code that must only be recognised on generated images need not divide real ones. So predictions for real
images should be certain, evenly used over the classes (IMSAT), and the same for an image and an augmented
copy with a part erased; what the copies change (slant, size) then does not divide classes. Once classes have
formed (smoothness_after), the worst small change of an image must not leave its class: rare forms of a digit
that had joined another come back. After the warm-up the generator comes in; earlier, classes would form
around its first, arbitrary images.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infocapsgan import losses
from infocapsgan.data.augment import random_affine, random_erasing
from infocapsgan.data.dataset import Dataset, in_batches, to_symmetric
from infocapsgan.engine.settings import Share, Weight, Whole
from infocapsgan.engine.train_state import TrainState
from infocapsgan.metrics.matching import clustering_metrics, kmeans_accuracy, match_clusters
from infocapsgan.plotting.sheet import Sheet
from infocapsgan.systems.gan import GAN, SAME_LATENTS, GANSettings

SAMPLES_PER_CODE = 10
NOTHING_LEARNED = "without --information-weight and --consistency-weight: real images then teach nothing"
SHORT = {"warm_up": 260, "smoothness_after": 150}  # on few training images


@dataclass(frozen=True, kw_only=True)
class ClassCodeSettings(GANSettings):
    """The options of all systems with a class code."""

    warm_up: Whole = 500
    """Steps on real images only, before the generator comes in."""
    settled_rate: Share = 0.2
    """The learning rate of the classes falls in a straight line, over the warm-up, to this share."""
    information_weight: Weight = 0.3
    """Weight of the mutual information between real images and their classes (IMSAT, IIC)."""
    balance: Weight = 4.0
    """How much even use of the classes counts in it, against certainty about each image."""
    consistency_weight: Weight = 1.0
    """Weight of: a real image and an augmented copy of it belong to the same class."""
    erased: Share = 0.5
    """Height and width of what is erased from that copy, at most, as a share of the image's."""
    smoothness_weight: Weight = 1.0
    """Weight of: the worst small change of a real image leaves its class (virtual adversarial training)."""
    smoothness_radius: Weight = 4.0
    """Length of that change, in units of pixels in [−1, 1]."""
    smoothness_after: Whole = 250
    """Steps before that weight counts: classes form faster without it. It ends with the warm-up."""

    @property
    def learns_of_real_images(self) -> bool:
        """Whether real images say anything of the classes: smoothness by itself keeps them as they are."""
        return bool(self.information_weight or self.consistency_weight)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warm_up and not self.learns_of_real_images:
            raise ValueError(f"--warm-up: got {self.warm_up}, takes 0 {NOTHING_LEARNED}")


GENERATED: dict[str, Any] = {"warm_up": 0, "settled_rate": 1.0, "smoothness_weight": 0.0}
GENERATED |= {"information_weight": 0.0, "consistency_weight": 0.0}
"""The options with which the class code is learned on generated images only, as published."""


class ClassCodeGAN(GAN):
    """A GAN whose discriminator says which class an image is of."""

    headline = "unsupervised_accuracy"
    settings: ClassCodeSettings
    label_of_code: Tensor

    @property
    def codes(self) -> int:
        return self.image_shape.classes

    def class_logits(self, images: Tensor) -> Tensor:
        """What a softmax turns into class probabilities [B, J], of images [B, C, H, W] in [−1, 1]."""
        raise NotImplementedError

    def generates(self, state: TrainState) -> bool:
        """Whether the generator takes part in this step."""
        return state.step >= self.settings.warm_up and not self.why_not("generate")

    def untrained(self, steps: int) -> str:
        """The generator, unless there are steps after the warm-up."""
        warm_up = f"it comes in after the {self.settings.warm_up} steps of --warm-up, and there are {steps}"
        untrained = steps <= self.settings.warm_up and not self.why_not("generate")
        return f"the generator is not trained: {warm_up}" if untrained else ""

    def decayed_rate(self, rate: float, state: TrainState) -> float:
        """A learning rate on its line from `rate` at the first step to the end of a warm-up."""
        s = self.settings
        done = min(1.0, state.step / s.warm_up) if s.warm_up else 0.0
        return rate * (1 - (1 - s.settled_rate) * done)

    def class_loss(self, real: Tensor, logits: Tensor, state: TrainState, named: dict[str, Tensor]) -> Tensor:
        """What real images [B, C, H, W], of class_logits [B, J], say of classes: see the module.

        Each part that has a weight is put into `named`.
        """
        s, loss = self.settings, torch.zeros((), device=real.device)
        p = logits.float().log_softmax(dim=1).exp()
        if s.information_weight:
            mean = state.processes.mean
            named["information"] = losses.mutual_information(p, mean=mean)
            loss = loss - s.information_weight * losses.mutual_information(p, balance=s.balance, mean=mean)
        if s.consistency_weight:
            copy = random_affine(real, state.rng, background=-1)
            copy = random_erasing(copy, state.rng, share=s.erased, background=-1)
            named["consistency"] = losses.divergence(p.detach(), self.class_log_probabilities(copy))
            loss = loss + s.consistency_weight * named["consistency"]
        smooth = s.smoothness_weight and state.step >= s.smoothness_after
        if smooth and not self.generates(state):
            log_p, radius = self.class_log_probabilities, s.smoothness_radius
            named["smoothness"] = losses.adversarial_smoothness(log_p, real, p, state.rng, radius=radius)
            loss = loss + s.smoothness_weight * named["smoothness"]
        return loss

    def class_log_probabilities(self, images: Tensor) -> Tensor:
        """Log-probabilities of the classes [B, J], of images [B, C, H, W] in [−1, 1]."""
        return self.class_logits(images).float().log_softmax(dim=1)

    def cluster(self, images: Tensor) -> Tensor:
        """The most probable class code of each image [N]."""
        return in_batches(lambda part: self.class_logits(to_symmetric(part)), images).argmax(dim=1)

    def code_probabilities(self, images: Tensor) -> Tensor:
        """The probability of each class code [N, codes]."""
        return self.class_log_probabilities(to_symmetric(images)).exp()

    def evaluate(self, dataset: Dataset) -> dict[str, float]:
        """Unsupervised accuracy, NMI and ARI, where the images have labels, and the share of each cluster."""
        test, metrics = self.cluster(dataset.test_images), {}
        if dataset.labelled:
            train, classes = self.cluster(dataset.train_images), self.image_shape.classes
            matched = match_clusters(train, dataset.train_labels, self.codes, classes)
            metrics = clustering_metrics(matched, test, dataset.test_labels)
            self.label_of_code.copy_(matched)
        shares = torch.bincount(test, minlength=self.codes) / len(test)
        return metrics | {f"share_of_cluster_{j}": share for j, share in enumerate(shares.tolist())}

    def baselines(self, dataset: Dataset) -> dict[str, float]:
        """k-means on the pixels, where the images have labels."""
        classes = self.image_shape.classes
        return {"k-means on pixels": kmeans_accuracy(dataset, classes)} if dataset.labelled else {}

    def code_latents(self) -> Tensor:
        """SAMPLES_PER_CODE latent vectors for each class code, code by code, the same at every call."""
        noise, code = self.fixed_latents(SAMPLES_PER_CODE), torch.arange(self.codes, device=self.device)
        return self.latents(noise.repeat(self.codes, 1), code.repeat_interleave(SAMPLES_PER_CODE))

    def pictures(self, dataset: Dataset) -> dict[str, Sheet]:
        """Samples, a row for each class code; none of a generator that is not trained."""
        if self.why_not("generate"):
            return {}
        return {"samples": self.code_sheet(self.code_latents(), xlabel=SAME_LATENTS)}

    def code_sheet(self, latents: Tensor, **labels: Any) -> Sheet:
        """Generated images, a row for each class code, named with the class that it was matched with."""
        columns = len(latents) // self.codes
        return Sheet(self.generate(latents), columns, self.code_names, ylabel=self.code_label, **labels)
