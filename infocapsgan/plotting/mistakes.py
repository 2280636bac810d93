"""Test images whose class is predicted wrongly."""

from matplotlib.figure import Figure
from torch import Tensor

from infocapsgan.data.dataset import to_unit
from infocapsgan.data.multi_mnist import overlay
from infocapsgan.engine.loaded_run import LoadedRun
from infocapsgan.engine.settings import Count
from infocapsgan.metrics.matching import match_clusters
from infocapsgan.plotting.figures import Sheet, sheet_figure
from infocapsgan.systems import NotApplicableError


def mistakes(run: LoadedRun, *, images: Count = 60) -> Figure:
    """The first of the test images where the predicted class is wrong, with both classes.

    Args:
        images: how many test images at most.
    """
    dataset, named = run.dataset, run.system.class_name
    predicted, meaning = _predicted(run)
    right = (predicted == dataset.test_labels).view(len(predicted), -1)
    wrong = (~right.all(dim=1)).nonzero()[:, 0]
    if not len(wrong):
        raise NotApplicableError("mistakes: the prediction is right for every test image")
    chosen = wrong[wrong < len(dataset.test_images)][:images]  # not all of many pairs are kept as images
    both = zip(dataset.test_labels[chosen], predicted[chosen], strict=True)
    captions = [f"{named(true)} → {named(guess)}" for true, guess in both]
    if max(map(len, captions)) > len("0+1 → 2+3"):
        captions = [caption.replace(" → ", "\n→ ") for caption in captions]
    pixels = to_unit(dataset.test_images[chosen])
    pixels = overlay(pixels) if pixels.shape[1] == 2 else pixels
    sheet = Sheet(pixels, min(10, len(chosen)), captions=captions, xlabel=f"label → {meaning}")
    title = f"{run.title}\nthe prediction is wrong for {len(wrong)} of {len(predicted)} test images"
    if len(chosen) < len(wrong):
        title += f"; the first {len(chosen)}"
    return sheet_figure(title, sheet)


def _predicted(run: LoadedRun) -> tuple[Tensor, str]:
    """The predicted class of each test image, and what it is called."""
    system, dataset = run.system, run.dataset
    if not dataset.labelled:
        raise NotApplicableError(f"mistakes does not apply to this {run.name}: its images have no labels")
    if system.why_not("cluster"):
        system.require("classify", "mistakes", "cluster")
        return system.test_predictions(dataset)["predicted"], "predicted class"
    clusters, classes = system.cluster(dataset.train_images), system.image_shape.classes
    matched = match_clusters(clusters, dataset.train_labels, system.codes, classes).to(run.device)
    return matched[system.cluster(dataset.test_images)], "label that its cluster was matched with in training"
