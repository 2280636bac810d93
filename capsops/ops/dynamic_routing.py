"""torch.ops.capsops.dynamic_routing: û [B, I, J, D] → v [B, J, D], and s of every pass."""

from typing import Any

from torch import Tensor

from capsops import reference
from capsops.ops import _shared_flops
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
from capsops.ops._shared_checks import (
    check_dense,
    check_routing,
    check_saved,
    effective_iterations,
    refuse_shape,
)
from capsops.ops._shared_flops import Shape

SCHEMA = f"(Tensor u_hat, {ROUTING}, bool detach, bool squash_output, str impl) -> (Tensor, Tensor)"
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor u_hat, Tensor? bias, Tensor s, int iterations, bool leaky, bool detach,"
    " bool squash_output, str impl) -> (Tensor, Tensor)"
)


def check(
    u_hat: Tensor, bias: Tensor | None, logits: Tensor | None, mask: Tensor | None, iterations: int
) -> None:
    check_dense("u_hat", u_hat)
    if u_hat.dim() != 4:
        refuse_shape("u_hat", u_hat, "BIJD")
    check_routing("u_hat", u_hat, u_hat.shape[2:], bias, logits, mask, iterations)


def check_backward(
    grad: Tensor, u_hat: Tensor, bias: Tensor | None, s: Tensor, iterations: int, leaky: bool
) -> None:
    check(u_hat, bias, None, None, iterations)
    batch, _, out_capsules, out_dim = u_hat.shape
    check_saved("u_hat", u_hat, (batch, out_capsules, out_dim), grad, s, iterations, leaky)


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
    check(u_hat, bias, logits, mask, iterations)
    iterations = effective_iterations(iterations, u_hat.shape[2], leaky)
    compute = backend_function(
        "dynamic_routing", impl, u_hat, lengths=u_hat.shape[3:], options=routing_options(squash_output)
    )
    return compute(u_hat.contiguous(), contiguous(bias), iterations, leaky, squash_output)


def kernel_backward(
    grad: Tensor,
    u_hat: Tensor,
    bias: Tensor | None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    check_backward(grad, u_hat, bias, s, iterations, leaky)
    iterations = effective_iterations(iterations, u_hat.shape[2], leaky)
    compute = backend_function(
        "dynamic_routing_backward",
        impl,
        u_hat,
        lengths=u_hat.shape[3:],
        options=routing_options(squash_output),
    )
    if s.dim() == 3:
        s = s.unflatten(2, u_hat.shape[2:])
    return compute(
        grad.contiguous(), u_hat.contiguous(), s.contiguous(), iterations, leaky, detach, squash_output
    )


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
    batch, _, out_capsules, out_dim = u_hat.shape
    return routing_fakes(u_hat, batch, out_capsules, out_dim, iterations, leaky)


def fake_backward(
    grad: Tensor,
    u_hat: Tensor,
    bias: Tensor | None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    check_backward(grad, u_hat, bias, s, iterations, leaky)
    return fake_like(u_hat), u_hat.new_empty(u_hat.shape[2:])


def save(ctx: Any, inputs: tuple, output: tuple) -> None:
    u_hat, bias, _, _, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u_hat, bias, saved(output[1]))


def gradient(ctx: Any, grad: Tensor | None, _: None) -> tuple:
    if grad is None:
        return (None,) * 9
    u_hat, bias, s = ctx.saved_tensors
    grad_u_hat, grad_bias = call_backward(
        is_plain_backward(grad, u_hat, bias, s), grad, u_hat, bias, s, *ctx.options
    )
    return grad_u_hat, None if bias is None else grad_bias, *(None,) * 7


def save_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad, u_hat, bias, _, *options, _ = inputs
    ctx.options = dict(zip(OPTIONS, options, strict=True))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, u_hat, bias)


def second_gradient(ctx: Any, grad_grad_u_hat: Tensor | None, grad_grad_bias: Tensor | None) -> tuple:
    grad, u_hat, bias = ctx.saved_tensors
    gradients = second_order(
        lambda x, b: reference.dynamic_routing(x, b, **ctx.options),
        (u_hat, bias),
        grad,
        (grad_grad_u_hat, grad_grad_bias),
    )
    return *gradients, *(None,) * 6


def flops(
    u_hat: Shape, bias: Any, logits: Any, mask: Any, iterations: int, leaky: bool, *_: Any, **__: Any
) -> int:
    return _shared_flops.forward(u_hat, _shared_flops.later_passes(iterations, u_hat[2], leaky))


def flops_backward(
    grad: Shape,
    u_hat: Shape,
    bias: Any,
    s: Shape,
    iterations: int,
    leaky: bool,
    detach: bool,
    *_: Any,
    **__: Any,
) -> int:
    return _shared_flops.backward(u_hat, _shared_flops.later_passes(iterations, u_hat[2], leaky), detach)


def shards(*_: Any) -> list[Shards]:
    """The batch."""
    return [((0, 1), {"u_hat": 0, "logits": 0, "mask": 0})]


def shards_backward(*_: Any) -> list[Shards]:
    return [((0, SUM), {"grad": 0, "u_hat": 0, "s": 1})]


call = register("dynamic_routing", SCHEMA, kernel, fake, (gradient, save), flops, shards, autocast=True)
call_backward = register(
    "dynamic_routing_backward",
    BACKWARD_SCHEMA,
    kernel_backward,
    fake_backward,
    (second_gradient, save_backward),
    flops_backward,
    shards_backward,
)
