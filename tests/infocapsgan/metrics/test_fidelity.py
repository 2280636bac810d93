import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from infocapsgan.metrics.frechet_distance import frechet_distance
from infocapsgan.metrics.precision_recall import precision_recall


def test_distance_of_two_normal_distributions_by_hand():
    # In one dimension it is (m_a − m_b)² + (σ_a − σ_b)²; the sample deviations are √2 and 2 √2.
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [7.0]])
    assert frechet_distance(a, b) == pytest.approx((1 - 5) ** 2 + 2)


def test_distance_is_that_of_scipy():
    real, generated = torch.randn(200, 6), 0.5 + torch.randn(150, 6) @ torch.randn(6, 6)
    mean, covariance = zip(
        *((x.numpy().mean(0), np.cov(x.numpy().T)) for x in (real, generated)), strict=True
    )
    root = sqrtm(covariance[0].astype(float) @ covariance[1].astype(float)).real
    wanted = ((mean[0] - mean[1]) ** 2).sum() + np.trace(covariance[0] + covariance[1] - 2 * root)
    assert frechet_distance(real, generated) == pytest.approx(wanted, rel=1e-5)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-6)


def test_precision_and_recall_by_hand():
    # With one neighbour each real point reaches 1, each generated one 0.5 or, the last, 9.5.
    real = torch.tensor([[0.0], [1.0], [100.0], [101.0]])
    generated = torch.tensor([[0.0], [0.5], [10.0]])
    precision, recall = precision_recall(real, generated, neighbours=1)
    assert precision == pytest.approx(2 / 3)
    assert recall == pytest.approx(2 / 4)


def test_the_same_images_and_far_ones():
    features = torch.rand(50, 4)
    assert precision_recall(features, features) == (1, 1)
    assert precision_recall(features, features + 10) == (0, 0)
    collapsed = features[:1].repeat(50, 1)
    precision, recall = precision_recall(features, collapsed)
    assert precision == 1
    assert recall == 1 / 50


def test_too_few_images():
    with pytest.raises(ValueError, match="neighbours: got 3, takes fewer"):
        precision_recall(torch.rand(3, 2), torch.rand(9, 2))
