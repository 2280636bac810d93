"""Test images that are taken for what they are not."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from infocapsgan.data import Dataset
from infocapsgan.data.dataset import to_unit
from infocapsgan.engine.loaded_run import LoadedRun
from infocapsgan.evaluate import NotApplicableError, no_labels
from infocapsgan.metrics.clustering import match_clusters
from infocapsgan.plotting.sheet import sheet_figure
from infocapsgan.systems import CapsNet, Encoder, InfoCapsGAN, InfoGAN
from infocapsgan.systems.capsnet import encoder_input, label_columns


def mistakes(run: LoadedRun, *, images: int = 60) -> Figure:
    """The first of the test images where the predicted class is wrong, with both classes."""
    dataset = run.dataset
    predicted, means = _predicted(run, dataset)
    right = predicted == dataset.test_labels
    wrong = (~label_columns(right).all(dim=1)).nonzero()[:, 0]
    if not len(wrong):
        raise NotApplicableError("mistakes: every test image is taken for what it is")
    chosen = wrong[wrong < len(dataset.test_images)][:images]  # not all of many pairs are kept as images
    captions = [
        f"{run.named(true)} → {run.named(guess)}"
        for true, guess in zip(dataset.test_labels[chosen], predicted[chosen], strict=True)
    ]
    words = max(map(len, captions)) > len("0+1 → 2+3")
    return sheet_figure(
        f"{run.title}\n{len(wrong)} of {len(predicted)} test images are taken for another class"
        + (f"; the first {len(chosen)}" if len(chosen) < len(wrong) else ""),
        encoder_input(to_unit(dataset.test_images[chosen])),
        min(10, len(chosen)),
        captions=[caption.replace(" → ", "\n→ ") if words else caption for caption in captions],
        xlabel=f"label → {means}",
    )


def _predicted(run: LoadedRun, dataset: Dataset) -> tuple[Tensor, str]:
    """The predicted class of each test image, and what it is called."""
    system = run.system
    if reason := no_labels(dataset):
        raise NotApplicableError(f"mistakes does not apply to this run of {run.name}: {reason}")
    if isinstance(system, (CapsNet, Encoder)):
        return system.predictions(dataset)["predicted"], "predicted class"
    if not isinstance(system, (InfoCapsGAN, InfoGAN)):
        raise NotApplicableError(f"mistakes does not apply to {run.name}: it does not classify")
    clusters = system.clusters(dataset.train_images)
    labels = match_clusters(clusters, dataset.train_labels, system.image_shape.classes)
    matched = torch.from_numpy(labels).to(run.device)[system.clusters(dataset.test_images)]
    return matched, "label that its cluster was matched with on the training split"
