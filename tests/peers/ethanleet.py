"""ethanleet/CapsNet, which adds a learned bias to s."""

from torch import Tensor

import capsops
from capsops.nn import RoutingCapsules
from tests.capsops.cases import Shape
from tests.peers.peer import Peer, bias_and_logits, capsules_and_weight, from_layout

LAYOUT = "1IJDK"


def squash(s: Tensor, eps: float) -> Tensor:
    """‖s‖² / (1 + ‖s‖²) · s / √(‖s‖² + ε)."""
    square = (s**2).sum(-1, keepdim=True)
    return square / (1 + square) * (s / (square + eps).sqrt())


def class_capsules(u: Tensor, weight: Tensor, bias: Tensor, eps: float, iterations: int = 3) -> Tensor:
    """ClassCapsules of model.py: u [B, I, K], W [1, I, J, D, K], β [1, 1, J, D] → v [B, J, D].

    û_ij = W_ij u_i; in each pass c = softmax_j(b), s_j = Σ_i c_ij û_ij + β_j, and b_ij ← b_ij + û_ij · v_j
    in all but the last.
    """
    u_hat = (weight @ u[:, :, None, :, None]).squeeze(-1)  # [B, I, J, D]
    b = u_hat.new_zeros(*u_hat.shape[:3], 1)
    for t in range(iterations):
        v = squash((b.softmax(2) * u_hat).sum(1, keepdim=True) + bias, eps)
        if t < iterations - 1:
            b = b + (u_hat * v).sum(-1, keepdim=True)
    return v.squeeze(1)


def replacement(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return capsops.capsule_routing(u, weight, bias, iterations=3)


CLASS_CAPSULES = Peer(
    name="ClassCapsules",
    repository="ethanleet/CapsNet",
    source="model.py, 5289a51; tools.py, f083da4",
    layer=class_capsules,
    replacement=replacement,
    inputs=lambda shape: (*capsules_and_weight(shape, LAYOUT), bias_and_logits(shape)[0][None, None]),
    convert=lambda u, weight, bias: (u, from_layout(weight, LAYOUT), bias[0, 0]),
    eps=1e-16,
    difference=1e-13,
    sizes=Shape(32, 1152, 10, 16, 8),
    module=lambda weight, bias: RoutingCapsules.from_weight(weight, LAYOUT, bias=bias),
)
