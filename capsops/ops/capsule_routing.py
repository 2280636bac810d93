"""torch.ops.capsops.capsule_routing: u [B, I, K] and W [I, J, D, K] → v [B, J, D], and s of every pass."""

from typing import Any

from torch import Tensor

from capsops import reference
from capsops.ops import _shared_flops, predictions
from capsops.ops._eager import is_plain_backward
from capsops.ops._register import (
    OPTIONS,
    ROUTING,
    backend_function,
    contiguous,
    fake_like,
    register,
    routing_fakes,
    routing_options,
    saved,
    second_order,
)
from capsops.ops._sharding import SUM, Shards
from capsops.ops._shared_checks import check_routing, check_saved, effective_iterations
from capsops.ops._shared_flops import Shape

SCHEMA = (
    f"(Tensor u, Tensor weight, {ROUTING}, bool detach, bool squash_output, str impl) -> (Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor u, Tensor weight, Tensor? bias, Tensor s, int iterations, bool leaky,"
    " bool detach, bool squash_output, bool needs_u, bool needs_weight, str impl)"
    " -> (Tensor, Tensor, Tensor)"
)


def check(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
) -> None:
    predictions.check(u, weight)
    check_routing("u", u, weight.shape[1:3], bias, logits, mask, iterations)


def check_backward(
    grad: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, iterations: int, leaky: bool
) -> None:
    check(u, weight, bias, None, None, iterations)
    check_saved("u", u, (u.shape[0], *weight.shape[1:3]), grad, s, iterations, leaky)


def kernel(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    check(u, weight, bias, logits, mask, iterations)
    iterations = effective_iterations(iterations, weight.shape[1], leaky)
    compute = backend_function(
        "capsule_routing", impl, u, weight, lengths=weight.shape[2:], options=routing_options(squash_output)
    )
    return compute(u.contiguous(), weight.contiguous(), contiguous(bias), iterations, leaky, squash_output)


def kernel_backward(
    grad: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    needs_u: bool,
    needs_weight: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_backward(grad, u, weight, bias, s, iterations, leaky)
    iterations = effective_iterations(iterations, weight.shape[1], leaky)
    compute = backend_function(
        "capsule_routing_backward",
        impl,
        u,
        weight,
        lengths=weight.shape[2:],
        options=routing_options(squash_output),
    )
    if s.dim() == 3:
        s = s.unflatten(2, weight.shape[1:3])
    return compute(
        grad.contiguous(),
        u.contiguous(),
        weight.contiguous(),
        s.contiguous(),
        iterations,
        leaky,
        detach,
        squash_output,
        needs_u,
        needs_weight,
    )


def fake(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    check(u, weight, bias, logits, mask, iterations)
    _, out_capsules, out_dim, _ = weight.shape
    return routing_fakes(u, u.shape[0], out_capsules, out_dim, iterations, leaky)


def fake_backward(
    grad: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    needs_u: bool,
    needs_weight: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_backward(grad, u, weight, bias, s, iterations, leaky)
    return fake_like(u, needs_u), fake_like(weight, needs_weight), u.new_empty(weight.shape[1:3])


def save(ctx: Any, inputs: tuple, output: tuple) -> None:
    u, weight, bias, _, _, *ctx.options, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, weight, bias, saved(output[1]))


def gradient(ctx: Any, grad: Tensor | None, _: None) -> tuple:
    if grad is None:
        return (None,) * 10
    u, weight, bias, s = ctx.saved_tensors
    needs_u, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    grad_u, grad_weight, grad_bias = call_backward(
        is_plain_backward(grad, u, weight, bias, s),
        grad,
        u,
        weight,
        bias,
        s,
        *ctx.options,
        needs_u,
        needs_weight,
        ctx.impl,
    )
    gradients = (
        grad_u if needs_u else None,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
    )
    return *gradients, *(None,) * 7


def save_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad, u, weight, bias, _, *options, ctx.needs_u, ctx.needs_weight, _ = inputs
    ctx.options = dict(zip(OPTIONS, options, strict=True))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, u, weight, bias)


def second_gradient(
    ctx: Any, grad_grad_u: Tensor | None, grad_grad_weight: Tensor | None, grad_grad_bias: Tensor | None
) -> tuple:
    grad, u, weight, bias = ctx.saved_tensors
    gradients = second_order(
        lambda x, w, b: reference.capsule_routing(x, w, b, **ctx.options),
        (u, weight, bias),
        grad,
        (
            grad_grad_u if ctx.needs_u else None,
            grad_grad_weight if ctx.needs_weight else None,
            grad_grad_bias,
        ),
    )
    return *gradients, *(None,) * 8


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
    later = _shared_flops.later_passes(iterations, weight[1], leaky)
    return _shared_flops.product(u, weight) + _shared_flops.forward((u[0], *weight[:3]), later)


def flops_backward(
    grad: Shape,
    u: Shape,
    weight: Shape,
    bias: Any,
    s: Shape,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    needs_u: bool,
    needs_weight: bool,
    *_: Any,
    **__: Any,
) -> int:
    later = _shared_flops.later_passes(iterations, weight[1], leaky)
    products = _shared_flops.product(u, weight) * (needs_u + needs_weight)
    return products + _shared_flops.backward((u[0], *weight[:3]), later, detach)


def shards(*_: Any) -> list[Shards]:
    """The batch."""
    return [((0, 1), {"u": 0, "logits": 0, "mask": 0})]


def shards_backward(*_: Any) -> list[Shards]:
    return [((0, SUM, SUM), {"grad": 0, "u": 0, "s": 1})]


call = register("capsule_routing", SCHEMA, kernel, fake, (gradient, save), flops, shards, autocast=True)
call_backward = register(
    "capsule_routing_backward",
    BACKWARD_SCHEMA,
    kernel_backward,
    fake_backward,
    (second_gradient, save_backward),
    flops_backward,
    shards_backward,
)
