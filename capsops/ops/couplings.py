"""torch.ops.capsops.couplings: the couplings c [B, I, J] of the last pass of capsule_routing. No gradient."""

from math import prod
from typing import Any

from torch import Tensor

from capsops.ops import _shared_flops
from capsops.ops._register import (
    ROUTING,
    backend_function,
    contiguous,
    register,
    with_three_axes,
)
from capsops.ops._sharding import Shards, logits_axis
from capsops.ops._shared_flops import Shape
from capsops.ops.capsule_routing import backend_weight, check, is_shared, prepared

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
    call = prepared(u, weight, bias, logits, mask, iterations, leaky, True)
    return backend_function("couplings", impl, u, call)(
        u.contiguous(),
        backend_weight(weight, call),
        contiguous(bias),
        with_three_axes(logits),
        contiguous(mask),
        call.iterations,
        leaky,
    )


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
    return u.new_empty(u.shape[0], u.shape[1], weight.shape[-3])


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
    later = _shared_flops.later_passes(iterations, weight[-3], leaky, logits)
    if later == 0:
        return 0
    if is_shared(u, weight):
        logits_of_last = 2 * u[0] * prod(weight[-3:]) + 2 * prod(u) * weight[-3]
        return _shared_flops.shared_forward(u, weight[-3:], later - 1) + logits_of_last
    u_hat = (u[0], *weight[:3])
    return _shared_flops.product(u, weight) + _shared_flops.forward(u_hat, later - 1) + 2 * prod(u_hat)


def shards(u: Any, weight: Any, bias: Any, logits: Any, *_: Any) -> list[Shards]:
    """The batch."""
    return [((0,), {"u": 0, "mask": 0, **logits_axis(logits, u)})]


call = register("couplings", SCHEMA, kernel, fake, flops=flops, shards=shards, autocast=True)
