"""Precision and recall of generated images, in the features of real and generated ones."""

import torch
from torch import Tensor

NEIGHBOURS = 3


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """The share of generated images among real ones, and of real images among generated ones.

    An image is among others where it is no farther from one of them than that one is from its k-th nearest
    neighbour in its own set (Kynkäänniemi et al. 2019, Improved precision and recall metric, k = 3).

    Takes the features of real images [N, F] and of about as many generated ones [M, F], N and M > k.
    """
    if min(len(real), len(generated)) <= neighbours:
        raise ValueError(f"neighbours: got {neighbours}, takes fewer than there are images of either set")
    real, generated = real.double(), generated.double()
    k = neighbours + 1  # the nearest of a point to its own set is itself, at distance 0
    return _share_among(generated, real, k), _share_among(real, generated, k)


def _share_among(points: Tensor, others: Tensor, k: int) -> float:
    reach = torch.cat([_distance(part, others).kthvalue(k, dim=1).values for part in others.split(1000)])
    among = [(_distance(part, others) <= reach).any(dim=1) for part in points.split(1000)]
    return torch.cat(among).double().mean().item()


def _distance(a: Tensor, b: Tensor) -> Tensor:
    # By differences: products of large features would leave a point at a distance from itself.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
