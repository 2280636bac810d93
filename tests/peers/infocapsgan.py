"""aymenx17/InfoCapsGAN: the discriminator's two capsule layers, and the generator's, which does not route."""

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


def two_passes(u: Tensor, weight: Tensor, eps: float) -> Tensor:
    """u [B, I, K], W [1, J, I, D, K] → the second s [B, J, D].

    û_ji = W_ji u_i; c = softmax_j(b), s_j = Σ_i c_ji û_ji, for b = 0 and then for b_ji = û_ji · squash(s_j).
    The loop over num_routing returns in its first turn: there are two passes, whatever number is asked for.
    """
    u_hat = (weight @ u[:, None, :, :, None]).squeeze(-1)  # [B, J, I, D]
    b = u_hat.new_zeros(*u_hat.shape[:3], 1)
    v = squash((b.softmax(1) * u_hat).sum(2), eps)
    b = b + u_hat @ v[..., None]
    return (b.softmax(1) * u_hat).sum(2)


def routing_capsules(u: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RoutingCapsules of dis_modules.py, then, as in network.py, (1 + ‖v‖) v with v = squash(s)."""
    v = squash(two_passes(u, weight, eps), eps)
    return (1 + v.norm(dim=-1, keepdim=True)) * v


def real_or_fake(u: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RealOrFake of dis_modules.py: W [1, 1, I, D, K]. With one output capsule every coupling is 1."""
    return squash(two_passes(u, weight, eps), eps)


def gen_capsules(u: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The primary capsules of GenCapsules in gen_modules.py: squash(Σ_i W_ji u_i), W [1, J, I, D, K]."""
    return squash((weight @ u[:, None, :, :, None]).squeeze(-1).sum(2), eps)


def routing_capsules_replacement(u: Tensor, weight: Tensor) -> Tensor:
    v = capsops.squash(capsops.capsule_routing(u, weight, iterations=2, squash_output=False))
    return (1 + v.norm(dim=-1, keepdim=True)) * v


def real_or_fake_replacement(u: Tensor, weight: Tensor) -> Tensor:
    return capsops.capsule_routing(u, weight, iterations=2)


def gen_capsules_replacement(u: Tensor, weight: Tensor) -> Tensor:
    return capsops.capsule_routing(u, weight, iterations=0)


def _peer(name: str, source: str, **fields: object) -> Peer:
    return Peer(
        name=name,
        repository="aymenx17/InfoCapsGAN",
        source=source,
        inputs=lambda shape: capsules_and_weight(shape, LAYOUT),
        convert=lambda u, weight: (u, from_layout(weight, LAYOUT)),
        eps=1e-8,
        difference=1e-7,
        **fields,
    )


ROUTING_CAPSULES = _peer(
    "RoutingCapsules",
    "dis_modules.py, 9e3b6fe; network.py, 7dbb147",
    layer=routing_capsules,
    replacement=routing_capsules_replacement,
    sizes=Shape(32, 1152, 10, 16, 8),
)
REAL_OR_FAKE = _peer(
    "RealOrFake",
    "dis_modules.py, 9e3b6fe",
    layer=real_or_fake,
    replacement=real_or_fake_replacement,
    sizes=Shape(32, 10, 1, 62, 16),
    module=lambda weight: RoutingCapsules.from_weight(weight, LAYOUT),
    small=Shape(5, 10, 1, 62, 16),
)
GEN_CAPSULES = _peer(
    "GenCapsules",
    "gen_modules.py, a5a11b5",
    layer=gen_capsules,
    replacement=gen_capsules_replacement,
    sizes=Shape(32, 10, 1152, 8, 16),
    module=lambda weight: RoutingCapsules.from_weight(weight, LAYOUT, iterations=0),
    small=Shape(5, 10, 33, 8, 16),
)
