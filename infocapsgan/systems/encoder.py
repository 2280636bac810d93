"""The supervised baseline: InfoCapsGAN's encoder, trained with labels.

What InfoCapsGAN reaches without labels is measured against this: the same network, the same moved copies.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from infocapsgan import losses
from infocapsgan.data import Dataset
from infocapsgan.data.augment import random_affine
from infocapsgan.data.dataset import to_symmetric
from infocapsgan.engine.settings import Weight
from infocapsgan.engine.train_state import TrainState, adam
from infocapsgan.metrics.clustering import accuracy
from infocapsgan.models.capsule_encoder import CapsuleEncoder, lengths
from infocapsgan.systems.supervised import Supervised, SupervisedSettings


@dataclass(frozen=True, kw_only=True)
class EncoderSettings(SupervisedSettings):
    """Encoder: the supervised baseline that shares InfoCapsGAN's encoder."""

    learning_rate: Weight = 1e-3
    """Of Adam."""
    moved: bool = True
    """Whether to train on turned, scaled, sheared and shifted copies, as InfoCapsGAN does."""
    batch_norm: bool = False
    """Whether the encoder normalises after its first convolution."""


class Encoder(Supervised):
    """InfoCapsGAN's encoder as a classifier; the network is `model`."""

    Settings = EncoderSettings
    recipes: ClassVar = {
        "tuned": {},
        "published": {"batch_size": 100, "batch_norm": True, "moved": False},
    }
    tuned: ClassVar = {"digits": {"width": 32, "epochs": 15}}

    def __init__(self, settings: Settings | None = None, **options) -> None:
        super().__init__(settings, **options)
        s = self.settings
        self.model = CapsuleEncoder(*self.image_shape, width=s.width, batch_norm=s.batch_norm, bias=False)
        self.optimizers = {"model": adam(self.model.parameters(), s.learning_rate)}

    def step(self, images: Tensor, labels: Tensor, state: TrainState) -> dict[str, Tensor]:
        """One step on the margin loss."""
        images = to_symmetric(images)
        if self.settings.moved:
            images = random_affine(images, state.rng, background=-1)
        with state.autocast():
            found = lengths(self.model(images).classes)
            loss = self.margin_loss(found, labels).mean()
        state.update("model", loss)
        return {"margin": loss.detach(), "batch_accuracy": (found.argmax(dim=1) == labels).float().mean()}

    def margin_loss(self, found: Tensor, labels: Tensor) -> Tensor:
        """Margin loss of each image [B], of its class capsules' lengths [B, J]."""
        return losses.margin_loss(found.float(), F.one_hot(labels, self.image_shape.classes))

    def predictions(self, dataset: Dataset) -> dict[str, Tensor]:
        """For each test image its `predicted` class [N] and its `margin_loss` [N]."""
        found = torch.cat(
            [lengths(self.model(to_symmetric(part)).classes) for part in dataset.test_images.split(500)]
        )
        return {
            "predicted": found.argmax(dim=1),
            "margin_loss": self.margin_loss(found, dataset.test_labels),
        }

    def evaluate(self, dataset: Dataset) -> dict[str, float]:
        """Accuracy and margin loss on the test split."""
        judged = self.predictions(dataset)
        return {
            "accuracy": accuracy(judged["predicted"], dataset.test_labels),
            "margin_loss": judged["margin_loss"].mean().item(),
        }

    def validation_loss(self, held_out: Dataset) -> float:
        """Margin loss."""
        return self.evaluate(held_out)["margin_loss"]

    def pictures(self, dataset: Dataset) -> dict[str, tuple[Tensor, int]]:
        """Test images, a row for each class they are taken for; an empty place is grey."""
        images = dataset.test_images[:200]
        found = lengths(self.model(to_symmetric(images)).classes).argmax(dim=1)
        rows = []
        for j in range(self.image_shape.classes):
            row = images[found == j][:10].float() / 255
            rows.append(F.pad(row, [0, 0, 0, 0, 0, 0, 0, 10 - len(row)], value=0.5))
        return {"predictions": (torch.cat(rows), 10)}
