"""The supervised baseline: InfoCapsGAN's encoder, trained with labels.

What InfoCapsGAN reaches without labels is measured against this: the same network, the same augmented copies.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from infocapsgan import losses
from infocapsgan.data.augment import random_affine
from infocapsgan.data.dataset import Dataset, in_batches, to_symmetric, to_unit
from infocapsgan.engine.settings import Weight
from infocapsgan.engine.train_state import TrainState, adam
from infocapsgan.models.capsule_encoder import CapsuleEncoder, lengths
from infocapsgan.plotting.sheet import Sheet
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


class Encoder(Supervised, name="encoder"):
    """InfoCapsGAN's encoder as a classifier; the network is `model`."""

    Settings = EncoderSettings
    recipes: ClassVar = {"tuned": {}, "published": {"batch_size": 100, "batch_norm": True, "moved": False}}
    tuned: ClassVar = {"digits": {"width": 32, "epochs": 15}}
    settings: EncoderSettings

    def __init__(self, settings: EncoderSettings | None = None, **options: Any) -> None:
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
            capsules = lengths(self.model(images).classes)
            loss = losses.margin_loss(capsules.float(), labels).mean()
        state.update("model", loss)
        return {"margin": loss.detach(), "batch_accuracy": (capsules.argmax(dim=1) == labels).float().mean()}

    def test_predictions(self, dataset: Dataset) -> dict[str, Tensor]:
        """For each test image its `predicted` class [N] and its `margin_loss` [N]."""
        scores = in_batches(self.classify, dataset.test_images)
        margin = losses.margin_loss(scores, dataset.test_labels)
        return {"predicted": scores.argmax(dim=1), "margin_loss": margin}

    def pictures(self, dataset: Dataset) -> dict[str, Sheet]:
        """Test images, each in the row of the class that is predicted for it; an empty place is grey."""
        images, classes = dataset.test_images[:200], self.image_shape.classes
        predicted = self.classify(images).argmax(dim=1)
        rows = []
        for j in range(classes):
            row = to_unit(images[predicted == j][:10])
            rows.append(nn.functional.pad(row, [0, 0, 0, 0, 0, 0, 0, 10 - len(row)], value=0.5))
        names = [self.class_name(j) for j in range(classes)]
        sheet = Sheet(torch.cat(rows), 10, names, ylabel="predicted class", xlabel="test images")
        return {"predictions": sheet}
