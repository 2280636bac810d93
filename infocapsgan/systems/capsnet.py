"""CapsNet: a supervised classifier whose class capsules also reconstruct the image.

Sources: Sabour, Frosst, Hinton 2017, Dynamic Routing Between Capsules; the public studies of it in PyTorch
for the deconvolutional decoder, batch norm, the schedules of the reconstruction's weight, the initialisation.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from capsops.nn import RoutingCapsules
from infocapsgan import losses
from infocapsgan.data import NAMES, Dataset, augment
from infocapsgan.data.dataset import to_unit
from infocapsgan.data.multi_mnist import TEST_PAIRS, MultiMNIST, overlay
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.settings import Count, Share, Weight, Whole
from infocapsgan.engine.train_state import TrainState, adam
from infocapsgan.models import capsule_encoder as encoders
from infocapsgan.models.capsule_encoder import CLASS_DIM, Capsules, lengths
from infocapsgan.models.decoders import DeconvolutionalDecoder, FullyConnectedDecoder, masked
from infocapsgan.plotting.sheet import Sheet
from infocapsgan.systems.supervised import Supervised, SupervisedSettings

STACKED = {"stem": "stacked", "width": 64, "batch_size": 64}


@dataclass(frozen=True, kw_only=True)
class CapsNetSettings(SupervisedSettings):
    """CapsNet: supervised capsule classifier with reconstruction (Sabour, Frosst, Hinton 2017)."""

    dataset: Literal[NAMES] = "digits"  # type: ignore[valid-type]
    """Images to train on. digits comes with scikit-learn, no download; multi-mnist overlays pairs."""
    iterations: Count = 3
    """Routing iterations."""
    leaky: bool = False
    """Whether the routing has an orphan class."""
    stem: Literal["single", "stacked"] = "single"
    """One convolution of 9 × 9 before the primary capsules, or four of 3 × 3 with batch norm."""
    encoder_batch_norm: bool = False
    """Whether the encoder normalises after its first convolution; with the stacked ones it always does."""
    decoder: Literal["fc", "deconv"] = "fc"
    """Fully connected, or transposed convolutions with a fifth of the weights."""
    decoder_batch_norm: bool = False
    """Whether the decoder normalises before each ReLU."""
    reconstruction_weight: Weight = 0.0005
    """α, the weight of the reconstruction error summed over the pixels."""
    reconstruction_loss: Literal["squared", "absolute"] = "squared"
    """The error of a pixel."""
    reconstruction_schedule: Literal["constant", "late", "early"] = "constant"
    """Over the epochs e, late: α · (tanh(e/8 − π) + 1)/2; early: α · tanh(e/16)."""
    learning_rate: Weight = 1e-3
    """Of Adam."""
    rate_decay: Share = 1.0
    """What the learning rate is multiplied by after each epoch."""
    shift: Whole = 2
    """Each training image is moved by up to this many pixels along each axis."""
    turn: Weight = 0.0
    """Each training image is turned by up to this many degrees to either side."""
    resize: Share = 0.0
    """Each training image is made larger or smaller by up to this share."""
    shear: Weight = 0.0
    """Each training image is sheared by up to this much: a row's shift against one as far away."""
    deform: Weight = 0.0
    """Elastic deformation of training images: root mean square of a displacement, in pixels."""
    flip: bool = False
    """Whether half of the training images are mirrored."""
    brightness: Share = 0.0
    """Training images become brighter or darker by up to this much of the range of a pixel."""
    contrast: Share = 0.0
    """The contrast of training images is multiplied by 1 ± up to this much."""
    test_pairs: Count = TEST_PAIRS
    """Pairs in the test set of multi-mnist; the paper has 10,000,000."""


class CapsNetModel(nn.Module):
    """Capsule encoder and decoder, in the variants that the settings choose."""

    def __init__(self, channels: int, size: int, classes: int, settings: CapsNetSettings) -> None:
        super().__init__()
        s, numbers = settings, classes * CLASS_DIM
        options: dict[str, Any] = {"width": s.width, "iterations": s.iterations, "leaky": s.leaky}
        kind: type[nn.Module] = encoders.StackedCapsuleEncoder
        self.decoder: FullyConnectedDecoder | DeconvolutionalDecoder
        if s.stem == "single":
            kind, options["batch_norm"] = encoders.CapsuleEncoder, s.encoder_batch_norm
        self.encoder = kind(channels, size, classes, **options)
        norm = s.decoder_batch_norm
        if s.decoder == "fc":
            self.decoder = FullyConnectedDecoder(numbers, channels, size, batch_norm=norm)
        else:
            self.decoder = DeconvolutionalDecoder(numbers, classes, channels, size, batch_norm=norm)

    def forward(self, images: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] in [0, 1] → class capsules [B, J, 16] and reconstructions [B, C, H, W].

        A reconstruction comes from the capsule of `classes` [B], or where that is None of the longest.
        """
        capsules = self.encoder(images).classes
        if classes is None:
            classes = lengths(capsules).argmax(dim=1)
        return capsules, self.decoder(masked(capsules, classes))


class CapsNet(Supervised, name="capsnet"):
    """CapsNet; see the module. The network is `model`."""

    Settings = CapsNetSettings
    recipes: ClassVar = {"tuned": {"rate_decay": 0.95}, "published": {}}
    datasets: ClassVar = {
        "smallnorb": {"shift": 0, "brightness": 32 / 255, "contrast": 0.5},
        "multi-mnist": {"shift": 0},
        "cifar10": {"shift": 0, "flip": True, "brightness": 63 / 255, "contrast": 0.8},
    }
    tuned: ClassVar = {
        "digits": {"width": 32, "epochs": 15, "shift": 1},
        "mnist": STACKED | {"epochs": 30, "rate_decay": 0.87, "turn": 10.0, "resize": 0.1, "shear": 0.1},
        "multi-mnist": STACKED | {"epochs": 26, "rate_decay": 0.85},
    }
    networks = ("model.encoder", "model.decoder")
    settings: CapsNetSettings

    def __init__(self, settings: CapsNetSettings | None = None, **options: Any) -> None:
        super().__init__(settings, **options)
        self.model = CapsNetModel(*self.image_shape, self.settings)
        if self.settings.recipe == "published":
            self.apply(_initialise_as_published)
        self.optimizers = {"model": adam(self.model.parameters(), self.settings.learning_rate)}

    def load_data(self) -> Dataset:
        """The data set that the settings name, with as many test pairs as they say."""
        dataset, pairs = super().load_data(), self.settings.test_pairs
        return dataset.with_test_pairs(pairs) if isinstance(dataset, MultiMNIST) else dataset

    def step(self, images: Tensor, labels: Tensor, state: TrainState) -> dict[str, Tensor]:
        """One step on the margin loss and the weighted reconstruction error."""
        s = self.settings
        images = self.augmented(to_unit(images), state.rng)
        self.optimizers["model"].param_groups[0]["lr"] = s.learning_rate * s.rate_decay ** int(state.epoch)
        with state.autocast():
            capsules = self.capsules(images).classes
            margin = self.margin_loss(capsules, labels).mean()
            error = self.reconstruction_error(capsules, labels, images, s.reconstruction_loss).mean()
        weight = s.reconstruction_weight * schedule(s.reconstruction_schedule, state.epoch)
        state.update("model", margin + weight * error)
        right = (self.predicted(capsules, labels) == labels).float().mean()
        return {"margin": margin.detach(), "reconstruction": error.detach(), "batch_accuracy": right}

    def augmented(self, images: Tensor, rng: ShardedGenerator) -> Tensor:
        """Training images [B, C, H, W] in [0, 1] as the settings want them changed."""
        s = self.settings
        if s.turn or s.resize or s.shear:
            images = augment.random_affine(
                images, rng, degrees=s.turn, scale=s.resize, shear=s.shear, shift=0
            )
        if s.deform:
            images = augment.elastic_transform(images, rng, s.deform)
        if s.shift:
            images = augment.random_shift(images, rng, s.shift)
        if s.flip:
            images = augment.random_horizontal_flip(images, rng)
        if s.brightness or s.contrast:
            images = augment.color_jitter(images, rng, brightness=s.brightness, contrast=s.contrast)
        return images

    def margin_loss(self, capsules: Tensor, labels: Tensor) -> Tensor:
        """Margin loss of each image [B]; labels are [B], or [B, 2] of pairs."""
        target = nn.functional.one_hot(label_columns(labels), self.image_shape.classes).sum(dim=1)
        return losses.margin_loss(lengths(capsules.float()), target)

    def reconstruction_error(self, capsules: Tensor, classes: Tensor, images: Tensor, kind: str) -> Tensor:
        """The error of each image [B] reconstructed from its class; of a pair, the mean over its digits."""
        digits = images.split(1, dim=1) if classes.dim() == 2 else [images]
        both = zip(label_columns(classes).unbind(1), digits, strict=True)
        errors = [image_error(self.decode(capsules, one), digit, kind) for one, digit in both]
        return torch.stack(errors).mean(dim=0)

    def predicted(self, capsules: Tensor, labels: Tensor) -> Tensor:
        """The longest capsule of each image [B], or the two longest [B, 2], in the order of the labels."""
        longest = lengths(capsules).topk(label_columns(labels).shape[1], dim=1).indices
        if labels.dim() == 1:
            return longest[:, 0]
        crossed = (longest[:, 0] == labels[:, 1]) | (longest[:, 1] == labels[:, 0])
        return torch.where(crossed[:, None], longest.flip(1), longest)

    def test_predictions(self, dataset: Dataset) -> dict[str, Tensor]:
        """The `predicted` class of each test image, its `margin_loss` and its `squared_error` [N]."""
        parts = []
        for pixels, labels in dataset.test_batches(500):
            images = to_unit(pixels)
            capsules = self.capsules(images).classes
            classes = self.predicted(capsules, labels)
            margin = self.margin_loss(capsules, labels)
            parts.append((classes, margin, self.reconstruction_error(capsules, classes, images, "squared")))
        predicted, margin, squared = map(torch.cat, zip(*parts, strict=True))
        return {"predicted": predicted, "margin_loss": margin, "squared_error": squared}

    def capsules(self, images: Tensor) -> Capsules:
        return self.encoder(encoder_input(to_unit(images)))

    def decode(self, capsules: Tensor, classes: Tensor) -> Tensor:
        return self.model.decoder(masked(capsules, classes))

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images made from the longest class capsule of each image."""
        capsules = self.capsules(images).classes
        return self.decode(capsules, lengths(capsules).argmax(dim=1))

    def pictures(self, dataset: Dataset) -> dict[str, Sheet]:
        """The reconstructions of ten test images."""
        return {"reconstructions": self.reconstruction_sheet(dataset.head(10))}

    def reconstruction_sheet(self, dataset: Dataset) -> Sheet:
        """The test images; below each what is reconstructed from its true classes, and the predicted ones."""
        images, labels = to_unit(dataset.test_images), dataset.test_labels
        capsules = self.capsules(images).classes
        predicted = self.predicted(capsules, labels)
        shown, rows = [encoder_input(images)], ["image"]
        for name, classes in (("true", labels), ("predicted", predicted)):
            for digit, one in enumerate(label_columns(classes).unbind(1)):
                shown.append(self.decode(capsules, one))
                rows.append(f"from the {name} label" + f", digit {digit + 1}" * (classes.dim() == 2))
        both = zip(labels, predicted, strict=True)
        heads = [f"{self.class_name(true)}\n{self.class_name(guess)}" for true, guess in both]
        xlabel = "true label, and below the predicted one"
        return Sheet(torch.cat(shown), len(images), rows, heads, xlabel=xlabel)


def encoder_input(images: Tensor) -> Tensor:
    """What the encoder takes: images as they are, pairs of digits [B, 2, H, W] overlaid."""
    return overlay(images) if images.shape[1] == 2 else images


def label_columns(labels: Tensor) -> Tensor:
    """Labels [B] or [B, 2] → [B, 1] or [B, 2]."""
    return labels.view(len(labels), -1)


def image_error(rebuilt: Tensor, images: Tensor, kind: str) -> Tensor:
    """The "squared" or "absolute" error of each image [B], summed over its pixels in [0, 1]."""
    difference = (rebuilt.float() - images).flatten(1)
    return (difference.square() if kind == "squared" else difference.abs()).sum(dim=1)


def schedule(kind: str, epoch: float) -> float:
    """What α is multiplied by at an epoch."""
    if kind == "late":
        return (math.tanh(epoch / 8 - math.pi) + 1) / 2
    return math.tanh(epoch / 16) if kind == "early" else 1.0


def _initialise_as_published(module: nn.Module) -> None:
    """Xavier normal with gain 0.02; transformation weights normal × 0.002."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.xavier_normal_(module.weight, gain=0.02)
    if isinstance(module, RoutingCapsules):
        nn.init.normal_(module.weight, std=0.002)
