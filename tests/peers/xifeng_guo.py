"""XifengGuo/CapsNet-Pytorch, whose couplings carry no gradient."""

import torch
from torch import Tensor

import capsops
from capsops.nn import RoutingCapsules
from tests.capsops.cases import Shape
from tests.peers.peer import Peer, capsules_and_weight, from_layout

LAYOUT = "JIDK"


def squash(s: Tensor, eps: float) -> Tensor:
    """‖s‖² / (1 + ‖s‖²) / (‖s‖ + ε) · s."""
    length = s.norm(dim=-1, keepdim=True)
    return length**2 / (1 + length**2) / (length + eps) * s


def dense_capsule(u: Tensor, weight: Tensor, eps: float) -> Tensor:
    """DenseCapsule of capsulelayers.py: u [B, I, K], W [J, I, D, K] → v [B, J, D].

    û_ji = W_ji u_i; c = softmax_j(b); s_j = Σ_i c_ji û_ji; b_ji ← b_ji + v_j · û_ji, three passes. In all but
    the last, û is detached.
    """
    u_hat = (weight @ u[:, None, :, :, None]).squeeze(-1)  # [B, J, I, D]
    fixed = u_hat.detach()
    b = u_hat.new_zeros(u_hat.shape[:-1])
    for _ in range(2):
        v = squash((torch.softmax(b, 1)[..., None] * fixed).sum(2, keepdim=True), eps)
        b = b + (v * fixed).sum(-1)
    return squash((torch.softmax(b, 1)[..., None] * u_hat).sum(2), eps)


def replacement(u: Tensor, weight: Tensor) -> Tensor:
    return capsops.capsule_routing(u, weight, iterations=3, detach=True)


DENSE_CAPSULE = Peer(
    name="DenseCapsule",
    repository="XifengGuo/CapsNet-Pytorch",
    source="capsulelayers.py, ce41f3a",
    layer=dense_capsule,
    replacement=replacement,
    inputs=lambda shape: capsules_and_weight(shape, LAYOUT),
    convert=lambda u, weight: (u, from_layout(weight, LAYOUT)),
    eps=1e-8,
    difference=1e-7,
    sizes=Shape(32, 1152, 10, 16, 8),
    module=lambda weight: RoutingCapsules.from_weight(weight, LAYOUT, detach=True),
)
