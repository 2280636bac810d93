import pytest
import torch

from infocapsgan.data import Dataset
from infocapsgan.metrics.matching import clustering_metrics, kmeans_accuracy, match_clusters


def test_the_map_is_one_to_one_even_where_a_cluster_has_no_image():
    clusters = torch.tensor([2, 2, 2, 0, 0, 2])
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    assert match_clusters(clusters, labels, 3, 3).tolist() == [1, 2, 0]


def test_two_clusters_of_one_label_count_once():
    # The larger part of label 0 keeps it: 3 of its 5 images are right, and the one image of label 1 is not.
    clusters = torch.tensor([0, 0, 0, 1, 1, 0])
    labels = torch.tensor([0, 0, 0, 0, 0, 1])
    matched = match_clusters(clusters, labels, 2, 2)
    assert (matched[clusters] == labels).double().mean() == 0.5


def test_clusters_that_are_left_over_have_no_label():
    clusters, labels = torch.tensor([0, 1, 1, 2, 2, 2]), torch.tensor([0, 0, 0, 1, 1, 1])
    matched = match_clusters(clusters, labels, 4, 2)
    assert matched.tolist() == [-1, 0, 1, -1]
    assert clustering_metrics(matched, clusters, labels)["unsupervised_accuracy"] == 5 / 6
    # Of fewer clusters than labels each has one.
    assert sorted(match_clusters(labels, clusters, 2, 3).tolist()) == [1, 2]


def test_the_map_of_the_training_split_is_applied_to_the_test_split():
    train = torch.tensor([1, 1, 0, 0]), torch.tensor([0, 0, 1, 1])
    test = torch.tensor([1, 0, 0, 0]), torch.tensor([0, 1, 1, 0])
    assert clustering_metrics(match_clusters(*train, 2, 2), *test)["unsupervised_accuracy"] == 0.75
    swapped = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1])
    assert clustering_metrics(match_clusters(*swapped, 2, 2), *test)["unsupervised_accuracy"] == 0.25


def test_perfect_clusters():
    labels = torch.arange(10).repeat(3)
    clusters = (labels + 3) % 10
    metrics = clustering_metrics(match_clusters(clusters, labels, 10, 10), clusters, labels)
    assert metrics == {"unsupervised_accuracy": 1.0, "nmi": pytest.approx(1), "ari": pytest.approx(1)}


def test_clusters_that_say_nothing():
    labels = torch.tensor([0, 1, 0, 1])
    clusters = torch.zeros(4, dtype=int)
    metrics = clustering_metrics(match_clusters(clusters, labels, 2, 2), clusters, labels)
    assert metrics == {"unsupervised_accuracy": 0.5, "nmi": 0.0, "ari": 0.0}


def test_kmeans_tells_black_from_white():
    images = torch.tensor([0, 255, 0, 255], dtype=torch.uint8)[:, None, None, None].expand(4, 1, 2, 2)
    labels = torch.tensor([1, 0, 1, 0])
    assert kmeans_accuracy(Dataset("small", images, labels, images, labels), 2) == 1


def test_kmeans_is_fitted_and_matched_on_the_training_split():
    def images(*values):
        return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)

    train = images(0, 255, 0, 255), torch.tensor([1, 0, 1, 0])
    test = images(0, 100, 100, 100), torch.tensor([0, 0, 0, 1])  # all are in the cluster of black, label 1
    assert kmeans_accuracy(Dataset("small", *train, *test), 2) == 0.25
