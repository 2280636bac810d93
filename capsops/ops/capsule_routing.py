"""torch.ops.capsops.capsule_routing: u [B, I, K] and W [I, J, D, K] → v [B, J, D], and s of every pass.

W [J, D, K], or [1, J, D, K], is shared by all input capsules.
"""

from typing import Any

from torch import Tensor

from capsops import reference
from capsops.backends.backend import SHARED
from capsops.ops import _shared_flops, predictions
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

SCHEMA = (
    f"(Tensor u, Tensor weight, {ROUTING}, bool detach, bool squash_output, str impl) -> (Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor u, Tensor weight, Tensor? bias, Tensor? logits, Tensor? mask, Tensor s,"
    " int iterations, bool leaky, bool detach, bool squash_output, bool needs_u, bool needs_weight,"
    " bool needs_logits, str impl) -> (Tensor, Tensor, Tensor, Tensor)"
)


def is_shared(u: Shape, weight: Shape) -> bool:
    """Whether all input capsules share W, from the shapes of both; one input capsule has W to itself."""
    return len(weight) == 3 or (weight[0] == 1 and u[1] != 1)


def backend_weight(weight: Tensor, call: Prepared) -> Tensor:
    """W as backends take it: [I, J, D, K], or [J, D, K] where it is shared."""
    if SHARED in call.options and weight.dim() == 4:
        weight = weight[0]
    return weight.contiguous()


def check(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
) -> None:
    check_dense("u", u)
    check_like("weight", weight, "u", u)
    if u.dim() == 3 and (weight.dim() == 3 or (weight.dim() == 4 and weight.shape[0] == 1)):
        if weight.shape[-1] != u.shape[2]:  # shared by all input capsules
            axes = "1JDK"[-weight.dim() :]
            refuse_shape("weight", weight, axes, *[None] * (weight.dim() - 1), u.shape[2])
    elif weight.dim() not in (3, 4):
        raise ValueError(
            f"weight: got shape {list(weight.shape)}, takes [I, J, D, K], or [J, D, K] for all input capsules"
        )
    else:
        predictions.check(u, weight)
    sizes = (u.shape[0], u.shape[1], *weight.shape[-3:-1])
    check_routing("u", u, sizes, bias, logits, mask, iterations)


def check_backward(
    grad: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    s: Tensor,
    iterations: int,
    leaky: bool,
) -> None:
    check(u, weight, bias, logits, mask, iterations)
    out_capsules, out_dim = weight.shape[-3:-1]
    passes = saved_passes(iterations, out_capsules, leaky, logits)
    check_saved("u", u, (u.shape[0], out_capsules, out_dim), grad, s, passes)


def prepare(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    squash_output: bool,
) -> Prepared:
    """Checks the arguments of a call."""
    check(u, weight, bias, logits, mask, iterations)
    shapes = u.shape, weight.shape
    return Prepared(
        shapes,
        routing_options(squash_output, logits, mask, is_shared(*shapes)),
        u.numel() == 0 or weight.numel() == 0,
        effective_iterations(iterations, weight.shape[-3], leaky, logits),
    )


def prepare_backward(
    grad: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    squash_output: bool,
) -> Prepared:
    check_backward(grad, u, weight, bias, logits, mask, s, iterations, leaky)
    return prepare(u, weight, bias, logits, mask, iterations, leaky, squash_output)


prepared = once_for_each_kind(prepare, tensors=5)
_prepared_backward = once_for_each_kind(prepare_backward, tensors=7)


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
    call = prepared(u, weight, bias, logits, mask, iterations, leaky, squash_output)
    return backend_function("capsule_routing", impl, u, call)(
        u.contiguous(),
        backend_weight(weight, call),
        contiguous(bias),
        with_three_axes(logits),
        contiguous(mask),
        call.iterations,
        leaky,
        squash_output,
    )


def kernel_backward(
    grad: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    needs_u: bool,
    needs_weight: bool,
    needs_logits: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _prepared_backward(grad, u, weight, bias, logits, mask, s, iterations, leaky, squash_output)
    if s.dim() == 3:
        s = s.unflatten(2, weight.shape[-3:-1])
    compute = backend_function("capsule_routing_backward", impl, u, call)
    grad_u, grad_weight, grad_bias, grad_logits = compute(
        grad.contiguous(),
        u.contiguous(),
        backend_weight(weight, call),
        with_three_axes(logits),
        contiguous(mask),
        s.contiguous(),
        call.iterations,
        leaky,
        detach,
        squash_output,
        needs_u,
        needs_weight,
        needs_logits and logits is not None,
    )
    if needs_weight and grad_weight.dim() != weight.dim():
        grad_weight = grad_weight.unsqueeze(0)
    return grad_u, grad_weight, grad_bias, like_logits(grad_logits, logits, needs_logits)


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
    out_capsules, out_dim = weight.shape[-3:-1]
    passes = saved_passes(iterations, out_capsules, leaky, logits)
    return routing_fakes(u, u.shape[0], out_capsules, out_dim, passes)


def fake_backward(
    grad: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    needs_u: bool,
    needs_weight: bool,
    needs_logits: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_backward(grad, u, weight, bias, logits, mask, s, iterations, leaky)
    return (
        fake_like(u, needs_u),
        fake_like(weight, needs_weight),
        u.new_empty(weight.shape[-3:-1]),
        fake_like_logits(logits, needs_logits, u),
    )


def save(ctx: Any, inputs: tuple, output: tuple) -> None:
    u, weight, bias, logits, mask, *ctx.options, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, weight, bias, logits, mask, saved(output[1]))


def gradient(ctx: Any, grad: Tensor | None, _: None = None) -> tuple:
    if grad is None:
        return (None,) * 10
    u, weight, bias, logits, mask, s = ctx.saved_tensors
    needs_u, needs_weight, needs_bias, needs_logits, *_ = ctx.needs_input_grad
    grad_u, grad_weight, grad_bias, grad_logits = call_backward(
        is_plain_backward(grad, u, weight, bias, logits, mask, s),
        grad,
        u,
        weight,
        bias,
        logits,
        mask,
        s,
        *ctx.options,
        needs_u,
        needs_weight,
        needs_logits,
        ctx.impl,
    )
    return (
        grad_u if needs_u else None,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
        grad_logits if needs_logits else None,
        *(None,) * 6,
    )


def save_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad, u, weight, bias, logits, mask, _, *options, needs_u, needs_weight, needs_logits, _ = inputs
    ctx.options = dict(zip(OPTIONS, options, strict=True))
    ctx.needs = needs_u, needs_weight, True, needs_logits
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, u, weight, bias, logits, mask)


def second_gradient(ctx: Any, *grad_grads: Tensor | None) -> tuple:
    grad, u, weight, bias, logits, mask = ctx.saved_tensors
    gradients = second_order(
        lambda x, w, b, start: reference.capsule_routing(x, w, b, logits=start, mask=mask, **ctx.options),
        (u, weight, bias, logits),
        grad,
        tuple(g if needed else None for g, needed in zip(grad_grads, ctx.needs, strict=True)),
    )
    return *gradients, *(None,) * 10


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
    later = _shared_flops.later_passes(iterations, weight[-3], leaky, logits)
    if is_shared(u, weight):
        return _shared_flops.shared_forward(u, weight[-3:], later)
    return _shared_flops.product(u, weight) + _shared_flops.forward((u[0], *weight[:3]), later)


def flops_backward(
    grad: Shape,
    u: Shape,
    weight: Shape,
    bias: Any,
    logits: Any,
    mask: Any,
    s: Shape,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    needs_u: bool,
    needs_weight: bool,
    needs_logits: bool,
    *_: Any,
    **__: Any,
) -> int:
    later = _shared_flops.later_passes(iterations, weight[-3], leaky, logits)
    needs_logits = needs_logits and iterations > 0
    if is_shared(u, weight):
        return _shared_flops.shared_backward(
            u, weight[-3:], later, detach, needs_u, needs_weight, needs_logits
        )
    products = _shared_flops.product(u, weight) * (needs_u + needs_weight)
    return products + _shared_flops.backward((u[0], *weight[:3]), later, detach, needs_logits)


def shards(u: Any, weight: Any, bias: Any, logits: Any, *_: Any) -> list[Shards]:
    """The batch."""
    return [((0, 1), {"u": 0, "mask": 0, **logits_axis(logits, u)})]


def shards_backward(grad: Any, u: Any, weight: Any, bias: Any, logits: Any, *_: Any) -> list[Shards]:
    axes = logits_axis(logits, u)
    return [((0, SUM, SUM, axes.get("logits", SUM)), {"grad": 0, "u": 0, "mask": 0, "s": 1, **axes})]


call = register(
    "capsule_routing", SCHEMA, kernel, fake, (gradient, save), flops, shards, autocast=True, value_only=True
)
call_backward = register(
    "capsule_routing_backward",
    BACKWARD_SCHEMA,
    kernel_backward,
    fake_backward,
    (second_gradient, save_backward),
    flops_backward,
    shards_backward,
)
