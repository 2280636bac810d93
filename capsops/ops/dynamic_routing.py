"""torch.ops.capsops.dynamic_routing: û [B, I, J, D] or [B, I, D] → v [B, J, D], and s of every pass."""

from typing import Any

from torch import Tensor

from capsops import reference
from capsops.ops import _shared_flops
from capsops.ops._eager import is_plain_backward
from capsops.ops._register import (
    OPTIONS,
    ROUTING,
    Prepared,
    backend_function,
    contiguous,
    fake_like,
    fake_like_logits,
    like_logits,
    once_for_each_kind,
    register,
    routing_fakes,
    routing_options,
    saved,
    second_order,
    with_three_axes,
)
from capsops.ops._sharding import SUM, Shards, logits_axis
from capsops.ops._shared_checks import (
    check_dense,
    check_like,
    check_routing,
    check_saved,
    effective_iterations,
    refuse_shape,
    saved_passes,
)
from capsops.ops._shared_flops import Shape

SCHEMA = f"(Tensor u_hat, {ROUTING}, bool detach, bool squash_output, str impl) -> (Tensor, Tensor)"
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor u_hat, Tensor? bias, Tensor? logits, Tensor? mask, Tensor s, int iterations,"
    " bool leaky, bool detach, bool squash_output, bool needs_logits, str impl) -> (Tensor, Tensor, Tensor)"
)


def _sizes(u_hat: Tensor, bias: Tensor | None, logits: Tensor | None) -> tuple[int, int, int, int]:
    """B, I, J and D."""
    batch, in_capsules, *_, out_dim = u_hat.shape
    return batch, in_capsules, reference.out_capsules(u_hat, bias, logits), out_dim


def check(
    u_hat: Tensor, bias: Tensor | None, logits: Tensor | None, mask: Tensor | None, iterations: int
) -> None:
    check_dense("u_hat", u_hat)
    if u_hat.dim() == 3:
        _check_out_capsules(u_hat, bias, logits)
    elif u_hat.dim() != 4:
        raise ValueError(f"u_hat: got shape {list(u_hat.shape)}, takes [B, I, J, D], or [B, I, D] for all j")
    check_routing("u_hat", u_hat, _sizes(u_hat, bias, logits), bias, logits, mask, iterations)


def _check_out_capsules(u_hat: Tensor, bias: Tensor | None, logits: Tensor | None) -> None:
    """That `logits` or `bias` say how many output capsules there are."""
    for name, x in (("logits", logits), ("bias", bias)):
        if x is not None:
            check_like(name, x, "u_hat", u_hat)
    if bias is not None and bias.dim() != 2:
        refuse_shape("bias", bias, "JD", None, u_hat.shape[2])
    if bias is None and (logits is None or logits.dim() == 0):
        raise ValueError(
            f"u_hat: got shape {list(u_hat.shape)} without `bias` or `logits` […, J], takes [B, I, J, D], or"
            " [B, I, D] with one of them, which tells J"
        )


def check_backward(
    grad: Tensor,
    u_hat: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    s: Tensor,
    iterations: int,
    leaky: bool,
) -> None:
    check(u_hat, bias, logits, mask, iterations)
    batch, _, out_capsules, out_dim = _sizes(u_hat, bias, logits)
    passes = saved_passes(iterations, out_capsules, leaky, logits)
    check_saved("u_hat", u_hat, (batch, out_capsules, out_dim), grad, s, passes)


def prepare(
    u_hat: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    squash_output: bool,
) -> Prepared:
    check(u_hat, bias, logits, mask, iterations)
    out_capsules = reference.out_capsules(u_hat, bias, logits)
    return Prepared(
        (u_hat.shape,),
        routing_options(squash_output, logits, mask, u_hat.dim() == 3),
        any(x is not None and x.numel() == 0 for x in (u_hat, bias, logits)),
        effective_iterations(iterations, out_capsules, leaky, logits),
    )


def prepare_backward(
    grad: Tensor,
    u_hat: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    squash_output: bool,
) -> Prepared:
    check_backward(grad, u_hat, bias, logits, mask, s, iterations, leaky)
    return prepare(u_hat, bias, logits, mask, iterations, leaky, squash_output)


_prepared = once_for_each_kind(prepare, tensors=4)
_prepared_backward = once_for_each_kind(prepare_backward, tensors=6)


def kernel(
    u_hat: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    call = _prepared(u_hat, bias, logits, mask, iterations, leaky, squash_output)
    return backend_function("dynamic_routing", impl, u_hat, call)(
        u_hat.contiguous(),
        contiguous(bias),
        with_three_axes(logits),
        contiguous(mask),
        call.iterations,
        leaky,
        squash_output,
    )


def kernel_backward(
    grad: Tensor,
    u_hat: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    needs_logits: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _prepared_backward(grad, u_hat, bias, logits, mask, s, iterations, leaky, squash_output)
    if s.dim() == 3:
        s = s.unflatten(2, grad.shape[1:])
    compute = backend_function("dynamic_routing_backward", impl, u_hat, call)
    grad_u_hat, grad_bias, grad_logits = compute(
        grad.contiguous(),
        u_hat.contiguous(),
        with_three_axes(logits),
        contiguous(mask),
        s.contiguous(),
        call.iterations,
        leaky,
        detach,
        squash_output,
        needs_logits and logits is not None,
    )
    return grad_u_hat, grad_bias, like_logits(grad_logits, logits, needs_logits)


def fake(
    u_hat: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    check(u_hat, bias, logits, mask, iterations)
    batch, _, out_capsules, out_dim = _sizes(u_hat, bias, logits)
    passes = saved_passes(iterations, out_capsules, leaky, logits)
    return routing_fakes(u_hat, batch, out_capsules, out_dim, passes)


def fake_backward(
    grad: Tensor,
    u_hat: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    needs_logits: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_backward(grad, u_hat, bias, logits, mask, s, iterations, leaky)
    return fake_like(u_hat), u_hat.new_empty(grad.shape[1:]), fake_like_logits(logits, needs_logits, u_hat)


def save(ctx: Any, inputs: tuple, output: tuple) -> None:
    u_hat, bias, logits, mask, *ctx.options, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u_hat, bias, logits, mask, saved(output[1]))


def gradient(ctx: Any, grad: Tensor | None, _: None = None) -> tuple:
    if grad is None:
        return (None,) * 9
    u_hat, bias, logits, mask, s = ctx.saved_tensors
    _, _, needs_logits, *_ = ctx.needs_input_grad
    grad_u_hat, grad_bias, grad_logits = call_backward(
        is_plain_backward(grad, u_hat, bias, logits, mask, s),
        grad,
        u_hat,
        bias,
        logits,
        mask,
        s,
        *ctx.options,
        needs_logits,
        ctx.impl,
    )
    return (
        grad_u_hat,
        None if bias is None else grad_bias,
        grad_logits if needs_logits else None,
        *(None,) * 6,
    )


def save_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad, u_hat, bias, logits, mask, _, *options, ctx.needs_logits, _ = inputs
    ctx.options = dict(zip(OPTIONS, options, strict=True))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, u_hat, bias, logits, mask)


def second_gradient(
    ctx: Any, grad_grad_u_hat: Tensor | None, grad_grad_bias: Tensor | None, grad_grad_logits: Tensor | None
) -> tuple:
    grad, u_hat, bias, logits, mask = ctx.saved_tensors
    grad_grads = (grad_grad_u_hat, grad_grad_bias, grad_grad_logits if ctx.needs_logits else None)
    gradients = second_order(
        lambda x, b, start: reference.dynamic_routing(x, b, logits=start, mask=mask, **ctx.options),
        (u_hat, bias, logits),
        grad,
        grad_grads,
    )
    return *gradients, *(None,) * 8


def flops(
    u_hat: Shape, bias: Any, logits: Any, mask: Any, iterations: int, leaky: bool, *_: Any, **__: Any
) -> int:
    if len(u_hat) == 3:  # shapes stand for the tensors here
        out_capsules = logits[-1] if logits else 1
        u_hat = (*u_hat[:2], bias[0] if bias and out_capsules == 1 else out_capsules, u_hat[2])
    return _shared_flops.forward(u_hat, _shared_flops.later_passes(iterations, u_hat[2], leaky, logits))


def flops_backward(
    grad: Shape,
    u_hat: Shape,
    bias: Any,
    logits: Any,
    mask: Any,
    s: Shape,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    needs_logits: bool,
    *_: Any,
    **__: Any,
) -> int:
    later = _shared_flops.later_passes(iterations, grad[1], leaky, logits)
    needs_logits = needs_logits and iterations > 0
    return _shared_flops.backward((*u_hat[:2], *grad[1:]), later, detach, needs_logits)


def shards(u_hat: Any, bias: Any, logits: Any, *_: Any) -> list[Shards]:
    """The batch."""
    return [((0, 1), {"u_hat": 0, "mask": 0, **logits_axis(logits, u_hat)})]


def shards_backward(grad: Any, u_hat: Any, bias: Any, logits: Any, *_: Any) -> list[Shards]:
    axes = logits_axis(logits, u_hat)
    return [((0, SUM, axes.get("logits", SUM)), {"grad": 0, "u_hat": 0, "mask": 0, "s": 1, **axes})]


call = register(
    "dynamic_routing", SCHEMA, kernel, fake, (gradient, save), flops, shards, autocast=True, value_only=True
)
call_backward = register(
    "dynamic_routing_backward",
    BACKWARD_SCHEMA,
    kernel_backward,
    fake_backward,
    (second_gradient, save_backward),
    flops_backward,
    shards_backward,
)
