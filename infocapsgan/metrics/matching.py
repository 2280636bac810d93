"""Clusters of images, learned without labels, matched with labels."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor

from infocapsgan.data import Dataset


def match_clusters(clusters: Tensor, labels: Tensor, codes: int, classes: int) -> Tensor:
    """The one-to-one map from clusters to labels under which most images are right (Hungarian method).

    From clusters of images [N], 0 … codes − 1, and their labels [N], 0 … classes − 1; returns the label of
    each cluster [codes], −1 for one that is left over.
    """
    count = np.zeros((codes, classes), dtype=np.int64)
    np.add.at(count, (clusters.cpu().numpy(), labels.cpu().numpy()), 1)
    matched = torch.full((codes,), -1)
    rows, columns = linear_sum_assignment(count, maximize=True)
    matched[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return matched


def clustering_metrics(label_of_cluster: Tensor, clusters: Tensor, labels: Tensor) -> dict[str, float]:
    """Unsupervised accuracy, normalised mutual information and adjusted Rand index of test images.

    From what match_clusters() returned for training images, and clusters and labels of test images [N].
    """
    clusters, labels = clusters.cpu(), labels.cpu()
    return {
        "unsupervised_accuracy": float((label_of_cluster.cpu()[clusters] == labels).double().mean()),
        "nmi": float(normalized_mutual_info_score(labels.numpy(), clusters.numpy())),
        "ari": float(adjusted_rand_score(labels.numpy(), clusters.numpy())),
    }


def kmeans_accuracy(dataset: Dataset, classes: int) -> float:
    """Unsupervised accuracy of k-means on the pixels: what a class code must beat to be worth its network.

    The best of ten starts by inertia, seed 0, fitted on at most the first 10,000 training images.
    """
    both = (dataset.train_images, dataset.test_images)
    pixels = [images.flatten(1).float().cpu().numpy() / 255 for images in both]
    kmeans = KMeans(classes, n_init=10, random_state=0).fit(pixels[0][:10_000])
    train, test = (torch.from_numpy(kmeans.predict(part)).long() for part in pixels)
    matched = match_clusters(train, dataset.train_labels, classes, classes)
    return float((matched[test] == dataset.test_labels.cpu()).double().mean())
