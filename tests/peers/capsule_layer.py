"""leftthomas/CapsuleLayer: routing_type="dynamic", with a weight for each input or one shared by all.

The last s is squashed only with squash=True. This is the version of commit 2205a60. Earlier versions differ:
they take the softmax over the input capsules, and some squash by ‖s‖ / (0.5 + ‖s‖²) · s.
"""

from torch import Tensor

import capsops
from capsops.nn import RoutingCapsules
from tests.capsops.cases import Shape
from tests.peers.peer import Peer, capsules_and_weight, from_layout


def squash(s: Tensor, eps: float) -> Tensor:
    """‖s‖ / (1 + ‖s‖²) · s, as in capsops; the repository has no epsilon."""
    length = s.norm(dim=-1, keepdim=True)
    return length / (1 + length**2 + eps) * s


def route(u_hat: Tensor, eps: float, iterations: int) -> Tensor:
    """dynamic_routing of functional.py: û [B, J, I, D] → s [B, J, D], the last s, not squashed.

    c = softmax_j(b), s_j = Σ_i c_ji û_ji, b_ji ← b_ji + û_ji · squash(s_j). b is stored as
    large as û, every logit D times.
    """
    b = u_hat.new_zeros(u_hat.shape)
    for t in range(iterations):
        s = (b.softmax(-3) * u_hat).sum(-2, keepdim=True)
        if t < iterations - 1:
            b = b + (u_hat * squash(s, eps)).sum(-1, keepdim=True)
    return s.squeeze(-2)


def capsule_linear(u: Tensor, weight: Tensor, eps: float) -> Tensor:
    """CapsuleLinear(share_weight=False, squash=True): u [B, I, K], W [J, I, D, K] → v [B, J, D]."""
    return squash(route((weight @ u[:, None, :, :, None]).squeeze(-1), eps, 3), eps)


def capsule_linear_shared(u: Tensor, weight: Tensor, eps: float) -> Tensor:
    """CapsuleLinear(share_weight=True, squash=False): u [B, I, K], W [J, D, K] → s [B, J, D]."""
    return route((weight[:, None] @ u[:, None, :, :, None]).squeeze(-1), eps, 3)


def replacement(u: Tensor, weight: Tensor) -> Tensor:
    return capsops.capsule_routing(u, weight, iterations=3)


def replacement_shared(u: Tensor, weight: Tensor) -> Tensor:
    return capsops.capsule_routing(u, weight, iterations=3, squash_output=False)


CAPSULE_LINEAR = Peer(
    name="CapsuleLinear",
    repository="leftthomas/CapsuleLayer",
    source="capsule_layer/functional.py and modules.py, 2205a60",
    layer=capsule_linear,
    replacement=replacement,
    inputs=lambda shape: capsules_and_weight(shape, "JIDK"),
    convert=lambda u, weight: (u, from_layout(weight, "JIDK")),
    eps=0,
    difference=1e-10,
    sizes=Shape(32, 1152, 10, 16, 8),
    module=lambda weight: RoutingCapsules.from_weight(weight, "JIDK"),
)

CAPSULE_LINEAR_SHARED = Peer(
    name="CapsuleLinear, one weight",
    repository="leftthomas/CapsuleLayer",
    source="capsule_layer/functional.py and modules.py, 2205a60",
    layer=capsule_linear_shared,
    replacement=replacement_shared,
    inputs=lambda shape: capsules_and_weight(shape, "JDK"),
    convert=lambda u, weight: (u, weight),
    eps=0,
    difference=1e-10,
    sizes=Shape(32, 1152, 10, 16, 8),
)
