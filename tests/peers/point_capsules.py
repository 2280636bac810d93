"""yongheng1991/3D-point-capsule-networks: 1024 capsules of a point cloud to 16 latent capsules of 64."""

import torch
from torch import Tensor

import capsops
from capsops.nn import RoutingCapsules
from tests.capsops.cases import Shape
from tests.peers.peer import Peer, capsules_and_weight, from_layout

LAYOUT = "JIDK"


def squash(s: Tensor, eps: float) -> Tensor:
    """‖s‖² s / ((1 + ‖s‖²) ‖s‖); the repository has no epsilon."""
    square = (s**2).sum(-1, keepdim=True)
    return square * s / ((1 + square) * (square.sqrt() + eps))


def latent_caps_layer(u: Tensor, weight: Tensor, eps: float) -> Tensor:
    """LatentCapsLayer of models/pointcapsnet_ae.py: u [B, I, K], W [J, I, D, K] → v [B, J, D].

    û_ji = W_ji u_i; three passes of c = softmax_j(b), s_j = Σ_i c_ji û_ji, b_ji ← b_ji + v_j · û_ji. In the
    first two, û is detached.
    """
    u_hat = (weight @ u[:, None, :, :, None]).squeeze(-1)  # [B, J, I, D]
    fixed = u_hat.detach()
    b = u_hat.new_zeros(u_hat.shape[:3])
    for t in range(3):
        terms = torch.softmax(b, 1)[..., None] * (u_hat if t == 2 else fixed)
        v = squash(terms.sum(2, keepdim=True), eps)
        b = b + (v * fixed).sum(-1)
    return v.squeeze(2)


def replacement(u: Tensor, weight: Tensor) -> Tensor:
    return capsops.capsule_routing(u, weight, iterations=3, detach=True)


LATENT_CAPS_LAYER = Peer(
    name="LatentCapsLayer",
    repository="yongheng1991/3D-point-capsule-networks",
    source="models/pointcapsnet_ae.py, 1304d4b",
    layer=latent_caps_layer,
    replacement=replacement,
    inputs=lambda shape: capsules_and_weight(shape, LAYOUT),
    convert=lambda u, weight: (u, from_layout(weight, LAYOUT)),
    eps=0,
    difference=1e-10,
    sizes=Shape(8, 1024, 16, 64, 16),
    module=lambda weight: RoutingCapsules.from_weight(weight, LAYOUT, detach=True),
    small=Shape(3, 10, 16, 64, 16),
)
