"""adambielski/CapsNet-pytorch, whose starting logits are trained."""

import torch
from torch import Tensor

import capsops
from capsops.nn import RoutingCapsules
from tests.capsops.cases import Shape
from tests.peers.peer import Peer, bias_and_logits, capsules_and_weight

LAYOUT = "IK(JD)"


def squash(s: Tensor, eps: float) -> Tensor:
    """s · (‖s‖² / (1 + ‖s‖²) / ‖s‖); the repository has no epsilon."""
    square = s.pow(2).sum(2, keepdim=True)
    return s * (square / (1 + square) / (square.sqrt() + eps))


def caps_layer(u: Tensor, weight: Tensor, logits: Tensor, eps: float, iterations: int = 3) -> Tensor:
    """CapsLayer and AgreementRouting of net.py: u [B, I, K], W [I, K, J · D], b [I, J] → v [B, J, D].

    û_i = u_i W_i; a first pass with c = softmax_j(b), then n passes, each after b_ij ← b_ij + û_ij · v_j.
    So n iterations are n + 1 passes. The starting b is a parameter.
    """
    outputs = logits.shape[1]
    u_hat = (u[:, :, None] @ weight).view(*u.shape[:2], outputs, -1)  # [B, I, J, D]
    v = squash((logits.softmax(-1)[..., None] * u_hat).sum(1), eps)
    b = logits.expand(u.shape[0], -1, -1)
    for _ in range(iterations):
        b = b + (u_hat * v[:, None]).sum(-1)
        v = squash((torch.softmax(b, -1)[..., None] * u_hat).sum(1), eps)
    return v


def replacement(u: Tensor, weight: Tensor, logits: Tensor) -> Tensor:
    return capsops.capsule_routing(u, weight, logits=logits, iterations=3 + 1)


def convert(u: Tensor, weight: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return u, weight.unflatten(2, (logits.shape[1], -1)).permute(0, 2, 3, 1), logits


CAPS_LAYER = Peer(
    name="CapsLayer",
    repository="adambielski/CapsNet-pytorch",
    source="net.py, 130770c",
    layer=caps_layer,
    replacement=replacement,
    inputs=lambda shape: (*capsules_and_weight(shape, LAYOUT), bias_and_logits(shape)[1]),
    convert=convert,
    eps=0,
    difference=1e-10,
    sizes=Shape(32, 1152, 10, 16, 8),
    module=lambda weight, logits: RoutingCapsules.from_weight(
        weight, LAYOUT, out_capsules=logits.shape[1], iterations=3 + 1
    ),
)
