"""How well predictions, and clusters found without labels, agree with the labels."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, confusion_matrix, normalized_mutual_info_score
from torch import Tensor

from infocapsgan.data import Dataset

HIGHER_IS_BETTER = frozenset(
    {
        "accuracy",
        "unsupervised_accuracy",
        "nmi",
        "ari",
        "sample_precision",
        "sample_recall",
        "slant_rank_correlation",
        "stroke_width_rank_correlation",
        "digit_width_rank_correlation",
    }
)
LOWER_IS_BETTER = frozenset({"error", "pair_error", "margin_loss", "squared_error", "frechet_distance"})


def best(name: str, values: list[float]) -> float | None:
    """The best of a metric's values; None where neither more nor less of it is better."""
    if name in HIGHER_IS_BETTER:
        return max(values)
    return min(values) if name in LOWER_IS_BETTER else None


def match_clusters(clusters: Tensor, labels: Tensor, classes: int) -> np.ndarray:
    """The one-to-one map from clusters to labels under which most images are right (Hungarian method).

    Args:
        clusters: predicted cluster of each image [N], 0 … classes − 1.
        labels: label of each image [N], 0 … classes − 1.
        classes: how many there are of each.

    Returns:
        label of each cluster [classes].
    """
    count = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(count, (_numbers(clusters), _numbers(labels)), 1)
    return linear_sum_assignment(count, maximize=True)[1]


def clustering_metrics(
    train_clusters: Tensor, train_labels: Tensor, test_clusters: Tensor, test_labels: Tensor, classes: int
) -> dict[str, float]:
    """Unsupervised accuracy, normalised mutual information and adjusted Rand index on the test split.

    The map from clusters to labels is fitted on the training split and applied to the test split.
    """
    labels = match_clusters(train_clusters, train_labels, classes)
    test_clusters, test_labels = _numbers(test_clusters), _numbers(test_labels)
    return {
        "unsupervised_accuracy": float(np.mean(labels[test_clusters] == test_labels)),
        "nmi": float(normalized_mutual_info_score(test_labels, test_clusters)),
        "ari": float(adjusted_rand_score(test_labels, test_clusters)),
    }


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """The share of predictions [N] that equal their label [N]."""
    return float((predictions == labels).double().mean())


def confusion(predictions: Tensor, labels: Tensor, classes: int) -> dict[str, list]:
    """The confusion matrix, and from it how well each class is recognised.

    Args:
        predictions: [N] or, of several labels an image, [N, M] in the order of the labels.
        labels: of the same shape.
        classes: how many there are.

    Returns:
        `confusion`: how many images of label (row) were taken for a class (column) [classes][classes];
        `per_class_accuracy`: the share of each label's images that were recognised [classes]; None where the
        label has no image.
    """
    count = confusion_matrix(
        _numbers(labels).ravel(), _numbers(predictions).ravel(), labels=np.arange(classes)
    )
    per_class = [int(count[j, j]) / int(row.sum()) if row.any() else None for j, row in enumerate(count)]
    return {"confusion": count.tolist(), "per_class_accuracy": per_class}


def _numbers(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()


def kmeans_accuracy(dataset: Dataset, classes: int) -> float:
    """Unsupervised accuracy of k-means on the pixels: what a class code must beat to be worth its network.

    The best of ten starts by inertia, seed 0, fitted on at most the first 10,000 training images.
    """
    both = (dataset.train_images, dataset.test_images)
    pixels = [images.flatten(1).float().cpu().numpy() / 255 for images in both]
    kmeans = KMeans(classes, n_init=10, random_state=0).fit(pixels[0][:10_000])
    labels = match_clusters(torch.from_numpy(kmeans.predict(pixels[0])), dataset.train_labels, classes)
    return float(np.mean(labels[kmeans.predict(pixels[1])] == _numbers(dataset.test_labels)))
