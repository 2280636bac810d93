"""arogozhnikov/readable_capsnet: the paper's procedure with einsum, and the full gradient."""

import torch
from torch import Tensor

import capsops
from capsops.nn import RoutingCapsules
from tests.capsops.cases import Shape
from tests.peers.peer import Peer, capsules_and_weight, from_layout

LAYOUT = "IKJD"


def squash(s: Tensor, eps: float) -> Tensor:
    """‖s‖² / (1 + ‖s‖²) · s / ‖s‖; the repository has no epsilon."""
    square = (s**2).sum(-1, keepdim=True)
    return (square / (1 + square)) * (s / (square.sqrt() + eps))


def capsule_layer_with_routing(u: Tensor, weight: Tensor, eps: float, iterations: int = 3) -> Tensor:
    """CapsuleLayerWithRouting of capsnet.py: u [B, I, K], W [I, K, J, D] → v [B, J, D].

    û_ij = u_i W_ij; c = softmax_j(b), s_j = Σ_i c_ij û_ij, b_ij ← b_ij + û_ij · v_j (also after the
    last pass, where it is not used).
    """
    u_hat = torch.einsum("bik,ikjd->bijd", u, weight)
    b = u_hat.new_zeros(u_hat.shape[:3])
    for _ in range(iterations):
        v = squash(torch.einsum("bij,bijd->bjd", b.softmax(-1), u_hat), eps)
        b = b + torch.einsum("bijd,bjd->bij", u_hat, v)
    return v


def replacement(u: Tensor, weight: Tensor) -> Tensor:
    return capsops.capsule_routing(u, weight, iterations=3)


CAPSULE_LAYER_WITH_ROUTING = Peer(
    name="CapsuleLayerWithRouting",
    repository="arogozhnikov/readable_capsnet",
    source="capsnet.py, 79149cd",
    layer=capsule_layer_with_routing,
    replacement=replacement,
    inputs=lambda shape: capsules_and_weight(shape, LAYOUT),
    convert=lambda u, weight: (u, from_layout(weight, LAYOUT)),
    eps=0,
    difference=1e-10,
    sizes=Shape(32, 1152, 10, 16, 8),
    module=lambda weight: RoutingCapsules.from_weight(weight, LAYOUT),
)
