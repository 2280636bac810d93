"""Measures a trained system: `python -m infocapsgan.evaluate RUN [options]`.

Writes RUN/evaluation.json: on a CPU the same at every call with as many threads. What is measured, in groups:

classification   systems trained with labels: accuracy, error, margin loss, squared error of what is
                 rebuilt from the predicted class, confusion matrix; of MultiMNIST also the error of pairs
clustering       systems with a class code: unsupervised accuracy (clusters are matched with labels on the
                 training split), NMI, ARI, confusion matrix
generation       systems with a generator: Fréchet distance to the test images, precision and recall, in
                 the features of a classifier trained on the same data (not Inception; see features.py)
codes            InfoGAN on digits: rank correlation of slant, width of stroke and digit with each code
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from infocapsgan.data import DataError, Dataset
from infocapsgan.data.dataset import evenly
from infocapsgan.engine import loaded_run as trained
from infocapsgan.engine.loaded_run import LoadedRun
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.run_directory import EVALUATION, RunError, device_name, versions, write_json
from infocapsgan.metrics import morphometry as strokes
from infocapsgan.metrics.clustering import clustering_metrics, confusion, match_clusters
from infocapsgan.metrics.features import FEATURES, feature_extractor
from infocapsgan.metrics.fidelity import NEIGHBOURS, frechet_distance, precision_recall
from infocapsgan.systems import CapsNet, Encoder, InfoCapsGAN, InfoGAN
from infocapsgan.systems.gan import GAN
from infocapsgan.systems.system import System

SAMPLES = 10_000
STROKE_SETS = ("digits", "mnist")
TRAVERSALS_PER_CLASS, TRAVERSAL_STEPS = 20, 11


class NotApplicableError(ValueError):
    """What was asked for does not exist for this system."""


def main() -> None:
    """The command line."""
    given = _parser().parse_args()
    try:
        run = trained.load(given.run, device=given.device, data_dir=given.data_dir)
        run.warn()
        result = evaluate(run, given.metrics, samples=given.samples)
    except (DataError, RunError, NotApplicableError) as error:
        sys.exit(f"error: {error}")
    write_json(given.run / EVALUATION, result)
    for name, value in result["metrics"].items():
        print(f"{name.replace('_', ' '):32}{value:.4f}")
    print(f"written to {given.run / EVALUATION}")


def evaluate(
    run: LoadedRun, groups: Sequence[str] | None = None, *, samples: int = SAMPLES
) -> dict[str, Any]:
    """What the metrics of `groups` say of a trained system, as evaluation.json holds it.

    Args:
        found: the system.
        groups: of GROUPS; None takes all that apply.
        samples: how many images are generated, and as many test images taken, or all where there are fewer.

    Raises:
        NotApplicableError: a group does not apply to this system.
    """
    dataset, settings = run.dataset, run.system.settings
    reasons = {group: why_not(run.system, dataset) for group, (why_not, _) in GROUPS.items()}
    applicable = [group for group, reason in reasons.items() if not reason]
    if not applicable:
        why = "; ".join(f"{group}: {reason}" for group, reason in reasons.items())
        raise NotApplicableError(f"no metric applies to this run of {run.name}: {why}")
    for group in groups or ():
        if reasons[group]:
            raise NotApplicableError(
                f"--metrics: {group} does not apply to this run of {run.name}: {reasons[group]}; "
                f"it takes {' and '.join(applicable)}"
            )
    result: dict[str, Any] = {
        "system": run.name,
        "dataset": settings.dataset,
        "recipe": settings.recipe,
        "seed": settings.seed,
        "weights": run.weights.checkpoint.name,
        "step": run.weights.step,
        "metrics": {},
    }
    with torch.no_grad():
        for group in groups or applicable:
            metrics, details = GROUPS[group][1](run.system, dataset, samples)
            result["metrics"] |= metrics
            if details:
                result[group] = details
    return result | {"device": device_name(run.device), "versions": versions()}


Found = tuple[dict[str, float], dict[str, Any]]
"""Metrics by name, and what else there is to be known."""


def classification(system: CapsNet | Encoder, dataset: Dataset, samples: int) -> Found:
    """Metrics of the predicted classes of the test split."""
    judged, labels = system.predictions(dataset), dataset.test_labels
    right = judged["predicted"] == labels
    accuracy = right.double().mean().item()
    metrics = {"accuracy": accuracy, "error": 1 - accuracy}
    if labels.dim() == 2:
        metrics["pair_error"] = 1 - right.all(dim=1).double().mean().item()
    for name in ("margin_loss", "squared_error"):
        if name in judged:
            metrics[name] = judged[name].double().mean().item()
    return metrics, confusion(judged["predicted"], labels, system.image_shape.classes)


def clustering(system: InfoCapsGAN | InfoGAN, dataset: Dataset, samples: int) -> Found:
    """Metrics of the clusters of the test split, matched with labels on the training split."""
    classes = system.image_shape.classes
    train, test = system.clusters(dataset.train_images), system.clusters(dataset.test_images)
    metrics = clustering_metrics(train, dataset.train_labels, test, dataset.test_labels, classes)
    matched = match_clusters(train, dataset.train_labels, classes)
    predicted = torch.from_numpy(matched)[test.cpu()]
    details = {"label_of_cluster": matched.tolist()}
    return metrics, details | confusion(predicted, dataset.test_labels.cpu(), classes)


def generation(system: GAN, dataset: Dataset, samples: int) -> Found:
    """Fréchet distance, precision and recall of generated images against test images.

    What training images reach against the same test images is given beside them: nobody gets far below it.
    """
    number = min(samples, len(dataset.test_images))
    extractor = feature_extractor(dataset, system.image_shape.classes)
    rng = ShardedGenerator(0, dataset.train_images.device)
    generated = system.generate(system.random_latents(number, rng, dataset.train_images))
    real, of_training, of_generated = (
        extractor.classifier.of_all(images)
        for images in (evenly(dataset.test_images, number), evenly(dataset.train_images, number), generated)
    )
    precision, recall = precision_recall(real, of_generated)
    metrics = {
        "frechet_distance": frechet_distance(real, of_generated),
        "sample_precision": precision,
        "sample_recall": recall,
    }
    return metrics, {
        "features": f"{FEATURES} of a classifier trained on {dataset.name}, not Inception",
        "classifier_accuracy": extractor.accuracy,
        "classifier_checksum": extractor.checksum,
        "samples": number,
        "frechet_distance_of_training_images": frechet_distance(real, of_training),
    }


def codes(system: InfoGAN, dataset: Dataset, samples: int) -> Found:
    """How monotone slant, stroke width and digit width move along each continuous code.

    Spearman's rank correlation of the code with the measure along rows in which only the code changes, from
    −1 to 1, averaged over the rows, 20 a class; a row along which a measure does not change counts as 0. The
    metrics are the largest absolute mean of any code.
    """
    classes = system.image_shape.classes
    values = torch.linspace(-1, 1, TRAVERSAL_STEPS, device=system.device)
    rows = torch.arange(classes, device=system.device).repeat_interleave(TRAVERSALS_PER_CLASS)
    per_code: dict[str, list[float]] = {name: [] for name in strokes.MEASURES}
    for index in range(system.settings.continuous_codes):
        images = system.generate(system.traversal(index, values, rows, ShardedGenerator(0, system.device)))
        for name, measure in strokes.MEASURES.items():
            per_code[name].append(mean_rank_correlation(values, measure(images).view(len(rows), -1)))
    metrics = {f"{name}_rank_correlation": max(map(abs, found)) for name, found in per_code.items()}
    return metrics, {f"{name}_of_each_code": found for name, found in per_code.items()}


def mean_rank_correlation(values: Tensor, rows: Tensor) -> float:
    """Spearman's rank correlation of `rows` [R, V] with `values` [V], averaged; constant rows are 0."""
    run = [
        spearmanr(values.cpu().numpy(), row).statistic if np.ptp(row) else 0.0 for row in rows.cpu().numpy()
    ]
    return float(np.mean(run))


def _no_labels_learned(system: System, dataset: Dataset) -> str:
    if not isinstance(system, (CapsNet, Encoder)):
        return "it is not trained with labels"
    return no_labels(dataset)


def _no_clusters(system: System, dataset: Dataset) -> str:
    if not isinstance(system, (InfoCapsGAN, InfoGAN)):
        return "it has no class code"
    return no_labels(dataset)


def _no_fidelity(system: System, dataset: Dataset) -> str:
    few = min(len(dataset.train_images), len(dataset.test_images)) <= NEIGHBOURS
    too_few = f"it takes {NEIGHBOURS + 1} training and test images" if few else ""
    return no_generator(system) or no_labels(dataset) or too_few


def _no_strokes(system: System, dataset: Dataset) -> str:
    if system.settings.dataset not in STROKE_SETS:
        return f"slant and width are measured on {' and '.join(STROKE_SETS)} alone"
    return no_continuous_codes(system)


def no_labels(dataset: Dataset) -> str:
    """Why nothing can be compared with labels; empty where it can."""
    return "" if dataset.labelled else "its images have no labels"


def no_generator(system: System) -> str:
    """Why the system generates no images; empty where it does."""
    if not isinstance(system, GAN):
        return "it has no generator"
    if isinstance(system, InfoCapsGAN) and not system.settings.adversarial_weight:
        return "with --adversarial-weight 0 its generator was not trained"
    return ""


def no_continuous_codes(system: System) -> str:
    """Why the system has no continuous codes; empty where it has."""
    if not isinstance(system, InfoGAN) or not system.settings.continuous_codes:
        return "it has no continuous codes"
    return ""


GROUPS: dict[str, tuple[Callable[[System, Dataset], str], Callable[..., Found]]] = {
    "classification": (_no_labels_learned, classification),
    "clustering": (_no_clusters, clustering),
    "generation": (_no_fidelity, generation),
    "codes": (_no_strokes, codes),
}
"""For each group why it does not apply to a system (empty where it does), and what measures it."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m infocapsgan.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=GROUPS,
        help="groups of metrics, the file then holds these alone (default: all that apply)",
    )
    parser.add_argument(
        "--samples",
        type=_at_least_100,
        default=SAMPLES,
        metavar="N",
        help="images to generate, no more than there are test images (default: %(default)s)",
    )
    add_run_options(parser)
    return parser


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What every command that reads a run can be told."""
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="where the data are, if not where the run found them"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)"
    )


def _at_least_100(word: str) -> int:
    if not word.isdecimal() or int(word) < 100:
        raise argparse.ArgumentTypeError(f"got {word}, takes a whole number of at least 100")
    return int(word)


if __name__ == "__main__":
    main()
