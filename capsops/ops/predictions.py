"""torch.ops.capsops.predictions: û_ij = W_ij u_i."""

from typing import Any

from torch import Tensor

from capsops import reference
from capsops.ops import _shared_flops
from capsops.ops._eager import is_plain_backward
from capsops.ops._register import (
    Prepared,
    backend_function,
    fake_like,
    once_for_each_kind,
    register,
    second_order,
)
from capsops.ops._sharding import SUM, Shards
from capsops.ops._shared_checks import check_dense, check_like, refuse_shape
from capsops.ops._shared_flops import Shape

SCHEMA = "(Tensor u, Tensor weight, str impl) -> Tensor"
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor u, Tensor weight, bool needs_u, bool needs_weight, str impl) -> (Tensor, Tensor)"
)


def check(u: Tensor, weight: Tensor) -> None:
    check_dense("u", u)
    check_like("weight", weight, "u", u)
    sizes, sizes_of_weight = u.shape, weight.shape
    if len(sizes_of_weight) != 4:
        refuse_shape("weight", weight, "IJDK")
    in_capsules, _, _, in_dim = sizes_of_weight
    if len(sizes) != 3 or sizes[1] != in_capsules or sizes[2] != in_dim:
        refuse_shape("u", u, "BIK", None, in_capsules, in_dim)


def check_backward(grad: Tensor, u: Tensor, weight: Tensor) -> None:
    check(u, weight)
    check_like("grad", grad, "u", u)
    sizes = (u.shape[0], *weight.shape[:3])
    if grad.shape != sizes:
        refuse_shape("grad", grad, "BIJD", *sizes)


def prepare(u: Tensor, weight: Tensor) -> Prepared:
    check(u, weight)
    return Prepared((u.shape, weight.shape), empty=u.numel() == 0 or weight.numel() == 0)


def prepare_backward(grad: Tensor, u: Tensor, weight: Tensor) -> Prepared:
    check_backward(grad, u, weight)
    return prepare(u, weight)


_prepared = once_for_each_kind(prepare, tensors=2)
_prepared_backward = once_for_each_kind(prepare_backward, tensors=3)


def kernel(u: Tensor, weight: Tensor, impl: str) -> Tensor:
    compute = backend_function("predictions", impl, u, _prepared(u, weight))
    return compute(u.contiguous(), weight.contiguous())


def kernel_backward(
    grad: Tensor, u: Tensor, weight: Tensor, needs_u: bool, needs_weight: bool, impl: str
) -> tuple[Tensor, Tensor]:
    compute = backend_function("predictions_backward", impl, u, _prepared_backward(grad, u, weight))
    return compute(grad.contiguous(), u.contiguous(), weight.contiguous(), needs_u, needs_weight)


def fake(u: Tensor, weight: Tensor, impl: str) -> Tensor:
    check(u, weight)
    return u.new_empty(u.shape[0], *weight.shape[:3])


def fake_backward(
    grad: Tensor, u: Tensor, weight: Tensor, needs_u: bool, needs_weight: bool, impl: str
) -> tuple[Tensor, Tensor]:
    check_backward(grad, u, weight)
    return fake_like(u, needs_u), fake_like(weight, needs_weight)


def save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    u, weight, ctx.impl = inputs
    ctx.save_for_backward(u, weight)


def gradient(ctx: Any, grad: Tensor) -> tuple:
    u, weight = ctx.saved_tensors
    needs_u, needs_weight, *_ = ctx.needs_input_grad
    grad_u, grad_weight = call_backward(
        is_plain_backward(grad, u, weight), grad, u, weight, needs_u, needs_weight, ctx.impl
    )
    return grad_u if needs_u else None, grad_weight if needs_weight else None, None


def save_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad, u, weight, ctx.needs_u, ctx.needs_weight, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, u, weight)


def second_gradient(ctx: Any, grad_grad_u: Tensor | None, grad_grad_weight: Tensor | None) -> tuple:
    grad, u, weight = ctx.saved_tensors
    grad_grads = (grad_grad_u if ctx.needs_u else None, grad_grad_weight if ctx.needs_weight else None)
    gradients = second_order(reference.predictions, (u, weight), grad, grad_grads)
    return *gradients, None, None, None


def flops(u: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return _shared_flops.product(u, weight)


def flops_backward(
    grad: Shape, u: Shape, weight: Shape, needs_u: bool, needs_weight: bool, *_: Any, **__: Any
) -> int:
    return _shared_flops.product(u, weight) * (needs_u + needs_weight)


def shards(*_: Any) -> list[Shards]:
    """The batch."""
    return [((0,), {"u": 0})]


def shards_backward(*_: Any) -> list[Shards]:
    return [((0, SUM), {"grad": 0, "u": 0})]


call = register("predictions", SCHEMA, kernel, fake, (gradient, save), flops, shards, autocast=True)
call_backward = register(
    "predictions_backward",
    BACKWARD_SCHEMA,
    kernel_backward,
    fake_backward,
    (second_gradient, save_backward),
    flops_backward,
    shards_backward,
)
