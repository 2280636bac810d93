"""danielhavir/capsule-network, whose couplings carry no gradient."""

import torch
from torch import Tensor

import capsops
from capsops.nn import RoutingCapsules
from tests.capsops.cases import Shape
from tests.peers.peer import Peer, capsules_and_weight, from_layout

LAYOUT = "1JIDK"


def squash(s: Tensor, eps: float) -> Tensor:
    """‖s‖² / (1 + ‖s‖²) · s / (‖s‖ + ε)."""
    square = (s**2).sum(-1, keepdim=True)
    return square / (1 + square) * s / (square.sqrt() + eps)


def routing_capsules(u: Tensor, weight: Tensor, eps: float, routings: int = 3) -> Tensor:
    """RoutingCapsules of capsules.py: u [B, I, K], W [1, J, I, D, K] → v [B, J, D].

    û_ji = W_ji u_i; `routings` − 1 passes on û detached, c = softmax_j(b), b_ji ← b_ji + û_ji · v_j, and a
    last pass on û itself.
    """
    u_hat = (weight @ u[:, None, :, :, None]).squeeze(-1)  # [B, J, I, D]
    fixed = u_hat.detach()
    b = u_hat.new_zeros(*u_hat.shape[:3], 1)
    for _ in range(routings - 1):
        v = squash((b.softmax(1) * fixed).sum(2), eps)
        b = b + torch.matmul(fixed, v[..., None])
    return squash((b.softmax(1) * u_hat).sum(2), eps)


def replacement(u: Tensor, weight: Tensor) -> Tensor:
    return capsops.capsule_routing(u, weight, iterations=3, detach=True)


ROUTING_CAPSULES = Peer(
    name="RoutingCapsules",
    repository="danielhavir/capsule-network",
    source="capsules.py, 009c9e9",
    layer=routing_capsules,
    replacement=replacement,
    inputs=lambda shape: capsules_and_weight(shape, LAYOUT),
    convert=lambda u, weight: (u, from_layout(weight, LAYOUT)),
    eps=1e-8,
    difference=1e-7,
    sizes=Shape(32, 1152, 10, 16, 8),
    module=lambda weight: RoutingCapsules.from_weight(weight, LAYOUT, detach=True),
)
