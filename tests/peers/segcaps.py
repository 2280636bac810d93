"""erfan-seifi/SegCaps_pytorch: routing among the types of capsules at each position of an image.

û comes from a convolution with one kernel for all types of input capsules. Routing is among the few capsules
at one position: the positions go into the batch.
"""

from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import conv2d

import capsops
from tests.capsops.cases import Shape
from tests.peers.peer import Peer

SIZES = Shape(2048, 4, 4, 32, 16)  # of cap_3; two images with 32 × 32 positions each
SMALL = Shape(18, 4, 4, 32, 16)


def squash(s: Tensor, eps: float) -> Tensor:
    """‖s‖ / (1 + ‖s‖² + ε) · s, along axis 3."""
    length = s.norm(dim=3, keepdim=True)
    return length / (1 + (length**2 + eps)) * s


def votes(u: Tensor, kernel: Tensor) -> Tensor:
    """û [B, I, J, D, H′, W′]: u [B, I, K, H, W] by a convolution of stride 2, kernel [J, D, K, 5, 5]."""
    u_hat = conv2d(u.flatten(0, 1), kernel.flatten(0, 1), stride=2, padding=2)
    return u_hat.unflatten(1, kernel.shape[:2]).unflatten(0, u.shape[:2])


def route(u_hat: Tensor, eps: float, iterations: int = 3) -> Tensor:
    """Routing of ConvCapsuleLayer in convcapsulelayer_unet.py: û [B, I, J, D, H, W] → v [B, J, D, H, W].

    c = softmax_j(b), s_j = Σ_i c_ij û_ij, b_ij ← b_ij + û_ij · v_j at each position (also after the
    last pass, where it is not used). Adding ε to every b before the softmax changes nothing.
    """
    b = u_hat.new_zeros(*u_hat.shape[:3], 1, *u_hat.shape[4:])
    for _ in range(iterations):
        v = squash((torch.softmax(b + eps, 2) * u_hat).sum(1, keepdim=True), eps)
        b = b + (u_hat * v).sum(3, keepdim=True)
    return v.squeeze(1)


def route_replacement(u_hat: Tensor) -> Tensor:
    B, _, _, _, H, W = u_hat.shape
    v = capsops.dynamic_routing(u_hat.permute(0, 4, 5, 1, 2, 3).flatten(0, 2), iterations=3)
    return v.unflatten(0, (B, H, W)).permute(0, 3, 4, 1, 2)


def conv_capsule_layer(u: Tensor, kernel: Tensor, eps: float) -> Tensor:
    """u [B, I, K, H, W] → v [B, J, D, H′, W′]."""
    return route(votes(u, kernel), eps)


def replacement(u: Tensor, kernel: Tensor) -> Tensor:
    return route_replacement(votes(u, kernel))


def inputs(shape: Shape) -> tuple[Tensor, Tensor]:
    """u and the kernel; `shape.B` positions of two square images."""
    side = isqrt(shape.B // 2)
    u = torch.randn(2, shape.I, shape.K, 2 * side, 2 * side, dtype=torch.float64)
    kernel = torch.randn(shape.J, shape.D, shape.K, 5, 5, dtype=torch.float64)
    return u, kernel / (25 * shape.K) ** 0.5


CONV_CAPSULE_LAYER = Peer(
    name="ConvCapsuleLayer",
    repository="erfan-seifi/SegCaps_pytorch",
    source="convcapsulelayer_unet.py, 6fd3ced",
    layer=conv_capsule_layer,
    replacement=replacement,
    inputs=inputs,
    convert=lambda u, kernel: (u, kernel),
    eps=1e-4,
    difference=3e-4,
    sizes=SIZES,
    small=SMALL,
)

ROUTING_ONLY = Peer(
    name="ConvCapsuleLayer, its routing only",
    repository="erfan-seifi/SegCaps_pytorch",
    source="convcapsulelayer_unet.py, 6fd3ced",
    layer=route,
    replacement=route_replacement,
    inputs=lambda shape: (votes(*inputs(shape)),),
    convert=lambda u_hat: (u_hat,),
    eps=1e-4,
    difference=3e-4,
    sizes=SIZES,
    small=SMALL,
)
