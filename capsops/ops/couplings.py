"""torch.ops.capsops.couplings: the couplings c [B, I, J] of the last pass of capsule_routing. No gradient."""

from math import prod
from typing import Any

from torch import Tensor

from capsops.ops import _shared_flops
from capsops.ops._register import ROUTING, backend_function, contiguous, register
from capsops.ops._sharding import Shards
from capsops.ops._shared_checks import effective_iterations
from capsops.ops._shared_flops import Shape
from capsops.ops.capsule_routing import check

SCHEMA = f"(Tensor u, Tensor weight, {ROUTING}, str impl) -> Tensor"


def kernel(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    impl: str,
) -> Tensor:
    check(u, weight, bias, logits, mask, iterations)
    iterations = effective_iterations(iterations, weight.shape[1], leaky)
    compute = backend_function("couplings", impl, u, weight, lengths=weight.shape[2:])
    return compute(u.contiguous(), weight.contiguous(), contiguous(bias), iterations, leaky)


def fake(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    impl: str,
) -> Tensor:
    check(u, weight, bias, logits, mask, iterations)
    return u.new_empty(u.shape[0], *weight.shape[:2])


def flops(
    u: Shape,
    weight: Shape,
    bias: Any,
    logits: Any,
    mask: Any,
    iterations: int,
    leaky: bool,
    *_: Any,
    **__: Any,
) -> int:
    """Operations of the passes before the last and of its logits; 0 where the couplings are uniform."""
    later = _shared_flops.later_passes(iterations, weight[1], leaky)
    if later == 0:
        return 0
    u_hat = (u[0], *weight[:3])
    return _shared_flops.product(u, weight) + _shared_flops.forward(u_hat, later - 1) + 2 * prod(u_hat)


def shards(*_: Any) -> list[Shards]:
    """The batch."""
    return [((0,), {"u": 0, "logits": 0, "mask": 0})]


call = register("couplings", SCHEMA, kernel, fake, flops=flops, shards=shards, autocast=True)
