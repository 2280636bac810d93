"""The classifier on whose features generated images are compared with real ones.

Inception knows photographs; for the small images here a convolutional classifier is trained on the training
split of the same data, always from seed 0, and kept in the user's cache folder, so that all runs on a data
set are measured by the same numbers. Of images without labels it learns by how many quarter turns each was
rotated (Gidaris, Singh, Komodakis 2018, Unsupervised Representation Learning by Predicting Image Rotations).
"""

import hashlib
import json
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from infocapsgan.data import Dataset
from infocapsgan.data.augment import random_shift
from infocapsgan.data.batches import Batches
from infocapsgan.data.dataset import TENSORS, in_batches, to_unit
from infocapsgan.data.files import cache_folder
from infocapsgan.engine.atomic import atomic_folder
from infocapsgan.engine.rng import ShardedGenerator

VERSION = 1  # of the network and what else is not in the key of the cache
FEATURES = 64
BATCH_SIZE, LEARNING_RATE, SHIFT = 128, 1e-3, 2
EPOCHS, IMAGES_SEEN = 2, 40_000  # at least so many of either: a small set is passed over more often


class FeatureClassifier(nn.Module):
    """Images [B, C, H, W] in [0, 1] → features [B, 64]; `classify` turns features into logits."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((channels, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(64 * (size // 4) ** 2, FEATURES), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.classify = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)

    def of_all(self, images: Tensor) -> Tensor:
        """Features [N, 64] of images [N, C, H, W] as uint8, or in [0, 1]."""
        with torch.no_grad():
            return in_batches(lambda part: self(to_unit(part)), images)


class FeatureExtractor(NamedTuple):
    """The classifier in evaluation mode, on the device of the data, and what tells it from others."""

    classifier: FeatureClassifier
    task: str  # what it tells apart, in a word
    accuracy: float  # on the test split
    checksum: str  # of its weights; figures of classifiers that differ here are not to be compared


def feature_extractor(dataset: Dataset, classes: int) -> FeatureExtractor:
    """The classifier of a data set: trained at the first call, read from the cache at later ones.

    Of several processes that train it at once the first to finish keeps it, and the others take that one.
    """
    folder = cache_folder() / "features" / f"{dataset.name}-{_key(dataset)}"
    device, task = dataset.train_images.device, "classes" if dataset.labelled else "rotations"
    if not dataset.labelled:
        dataset, classes = rotated(dataset), 4
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = FeatureClassifier(dataset.train_images.shape[1], dataset.size, classes).to(device)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _train(classifier, dataset)
        logits = classifier.classify(classifier.of_all(dataset.test_images))
        share = (logits.argmax(dim=1) == dataset.test_labels).double().mean().item()
        with atomic_folder(folder, keep=True) as temporary:
            save_file(classifier.state_dict(), temporary / "weights.safetensors")
            (temporary / "classifier.json").write_text(json.dumps({"accuracy": share}))
    classifier.load_state_dict(load_file(folder / "weights.safetensors"))
    share = json.loads((folder / "classifier.json").read_text())["accuracy"]
    checksum = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()[:16]
    return FeatureExtractor(classifier.eval().requires_grad_(False), task, share, checksum)


def rotated(dataset: Dataset) -> Dataset:
    """Each image rotated by 0 to 3 quarter turns, their number as its label."""

    def turn(images: Tensor) -> tuple[Tensor, Tensor]:
        turns = torch.arange(len(images), device=images.device) % 4
        parts = [torch.rot90(images[turns == n], n, dims=(2, 3)) for n in range(4)]
        return torch.cat(parts), torch.cat([turns[turns == n] for n in range(4)])

    (train, train_labels), (test, test_labels) = turn(dataset.train_images), turn(dataset.test_images)
    return Dataset(dataset.name, train, train_labels, test, test_labels, dataset.size)


@torch.enable_grad()
def _train(classifier: FeatureClassifier, dataset: Dataset) -> None:
    images, labels = dataset.train_images, dataset.train_labels
    batches = Batches(len(images), min(BATCH_SIZE, len(images)), 0, images.device)
    steps = max(EPOCHS * batches.per_epoch, IMAGES_SEEN // batches.batch_size)
    optimizer = torch.optim.Adam(classifier.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = ShardedGenerator(0, images.device)
    for step in tqdm(range(steps), "training the classifier of features", unit="step"):
        chosen = batches.indices(step)
        seen = random_shift(to_unit(images[chosen]), rng, SHIFT)
        loss = F.cross_entropy(classifier.classify(classifier(seen)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    classifier.eval()


def _key(dataset: Dataset) -> str:
    """Of how the classifier is trained, and all that it is trained and measured on."""
    training = (VERSION, EPOCHS, IMAGES_SEEN, BATCH_SIZE, LEARNING_RATE, SHIFT, dataset.size)
    digest = hashlib.sha256(repr(training).encode())
    for tensor in (getattr(dataset, name) for name in TENSORS):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().cpu().numpy().data)
    return digest.hexdigest()[:16]
