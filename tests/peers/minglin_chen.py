"""Minglin-Chen/Capsule-Network-in-PyTorch: a kernel for each pair of types, and trained starting logits.

Routing is among the types of capsules at each position of an image: the positions go into the batch.
"""

from collections.abc import Callable
from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import conv2d

import capsops
from tests.capsops.cases import Shape
from tests.peers.peer import Peer, bias_and_logits


def squash(s: Tensor, dim: int, eps: float) -> Tensor:
    """s / (‖s‖ + ε) · ‖s‖² / (1 + ‖s‖²)."""
    length = s.norm(dim=dim, keepdim=True)
    square = length * length
    return (s / (length + eps)) * (square / (1 + square))


def votes(u: Tensor, kernel: Tensor) -> Tensor:
    """û [B, I, J, D, H, W]: u [B, I, K, H, W] by a convolution in I groups, kernel [I, J, D, K, k, k]."""
    u_hat = conv2d(u.flatten(1, 2), kernel.flatten(0, 2), padding=kernel.shape[-1] // 2, groups=u.shape[1])
    return u_hat.unflatten(1, kernel.shape[:3])


def caps_conv_2d(u: Tensor, kernel: Tensor, logits: Tensor, eps: float, iterations: int = 3) -> Tensor:
    """CapsConv2D of models/CapsLayer.py: u [B, I, K, H, W], logits [1, I, J, 1, 1, 1] → v [B, J, D, H, W].

    b starts at the trained logits. After n passes of c = softmax_j(b), s_j = Σ_i c_ij û_ij and
    b_ij ← b_ij + squash(s_j) · û_ij comes one more: n iterations are n + 1 passes. b is stored as large as û,
    every logit D times.
    """
    u_hat = votes(u, kernel)
    b = logits.expand_as(u_hat)
    for _ in range(iterations):
        v = squash((b.softmax(2) * u_hat).sum(1, keepdim=True), 3, eps)
        b = b + (v * u_hat).sum(3, keepdim=True)
    return squash((b.softmax(2) * u_hat).sum(1), 2, eps)


def replacement(u: Tensor, kernel: Tensor, logits: Tensor) -> Tensor:
    u_hat = votes(u, kernel)
    B, _, _, _, H, W = u_hat.shape
    positions = u_hat.permute(0, 4, 5, 1, 2, 3).flatten(0, 2)  # [B · H · W, I, J, D]
    v = capsops.dynamic_routing(positions, logits=logits[0, ..., 0, 0, 0], iterations=3 + 1)
    return v.unflatten(0, (B, H, W)).permute(0, 3, 4, 1, 2)


def one_position_replacement(u: Tensor, kernel: Tensor, logits: Tensor) -> Tensor:
    """Where the kernel sees one position, it is the weight of capsule_routing, and û is not stored."""
    B, _, _, H, W = u.shape
    positions = u.permute(0, 3, 4, 1, 2).flatten(0, 2)  # [B · H · W, I, K]
    weight = kernel[..., 0, 0]
    v = capsops.capsule_routing(positions, weight, logits=logits[0, ..., 0, 0, 0], iterations=3 + 1)
    return v.unflatten(0, (B, H, W)).permute(0, 3, 4, 1, 2)


def inputs(shape: Shape, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """u, a kernel of k × k and the logits; `shape.B` positions of two square images."""
    side = isqrt(shape.B // 2)
    u = torch.randn(2, shape.I, shape.K, side, side, dtype=torch.float64)
    kernel = torch.randn(shape.I, shape.J, shape.D, shape.K, k, k, dtype=torch.float64)
    return u, kernel / (k * k * shape.K) ** 0.5, bias_and_logits(shape)[1][None, ..., None, None, None]


def _peer(name: str, replacement: Callable[..., Tensor], k: int) -> Peer:
    return Peer(
        name=name,
        repository="Minglin-Chen/Capsule-Network-in-PyTorch",
        source="models/CapsLayer.py, 12608b7",
        layer=caps_conv_2d,
        replacement=replacement,
        inputs=lambda shape: inputs(shape, k),
        convert=lambda u, kernel, logits: (u, kernel, logits),
        eps=1e-8,
        difference=1e-7,
        sizes=Shape(2048, 4, 4, 16, 16),
        small=Shape(18, 4, 4, 16, 16),
    )


CAPS_CONV_2D = _peer("CapsConv2D", replacement, k=3)
ONE_POSITION = _peer("CapsConv2D of one position", one_position_replacement, k=1)
