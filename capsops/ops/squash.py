"""torch.ops.capsops.squash: s · ‖s‖ / (1 + ‖s‖²) along one dimension."""

from typing import Any

from torch import Tensor

from capsops import reference
from capsops.ops._eager import is_plain_backward
from capsops.ops._register import (
    Prepared,
    backend_function,
    fake_like,
    once_for_each_kind,
    register,
    second_order,
)
from capsops.ops._sharding import Shards
from capsops.ops._shared_checks import check_dense, check_like

SCHEMA = "(Tensor s, int dim, str impl) -> Tensor"
BACKWARD_SCHEMA = "(Tensor grad, Tensor s, int dim, str impl) -> Tensor"


def check(s: Tensor, dim: int) -> None:
    check_dense("s", s)
    axes = s.dim()
    if axes == 0:
        raise ValueError("s: got a scalar, takes a tensor with at least one dimension")
    if not 0 <= dim < axes:
        raise ValueError(f"dim: got {dim}, takes 0 to {axes - 1} for a tensor of shape {list(s.shape)}")


def check_backward(grad: Tensor, s: Tensor, dim: int) -> None:
    check(s, dim)
    check_like("grad", grad, "s", s)
    if grad.shape != s.shape:
        raise ValueError(f"grad: got shape {list(grad.shape)}, takes that of s, which is {list(s.shape)}")


def prepare(s: Tensor, dim: int) -> Prepared:
    check(s, dim)
    return Prepared(empty=s.numel() == 0)


def prepare_backward(grad: Tensor, s: Tensor, dim: int) -> Prepared:
    check_backward(grad, s, dim)
    return prepare(s, dim)


_prepared = once_for_each_kind(prepare, tensors=1)
_prepared_backward = once_for_each_kind(prepare_backward, tensors=2)


def kernel(s: Tensor, dim: int, impl: str) -> Tensor:
    return backend_function("squash", impl, s, _prepared(s, dim))(s.contiguous(), dim)


def kernel_backward(grad: Tensor, s: Tensor, dim: int, impl: str) -> Tensor:
    compute = backend_function("squash_backward", impl, s, _prepared_backward(grad, s, dim))
    return compute(grad.contiguous(), s.contiguous(), dim)


def fake(s: Tensor, dim: int, impl: str) -> Tensor:
    check(s, dim)
    return fake_like(s)


def fake_backward(grad: Tensor, s: Tensor, dim: int, impl: str) -> Tensor:
    check_backward(grad, s, dim)
    return fake_like(s)


def save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    s, ctx.dim, ctx.impl = inputs
    ctx.save_for_backward(s)


def gradient(ctx: Any, grad: Tensor) -> tuple:
    (s,) = ctx.saved_tensors
    return call_backward(is_plain_backward(grad, s), grad, s, ctx.dim, ctx.impl), None, None


def save_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad, s, ctx.dim, _ = inputs
    ctx.save_for_backward(grad, s)


def second_gradient(ctx: Any, grad_grad: Tensor) -> tuple:
    grad, s = ctx.saved_tensors
    gradients = second_order(lambda x: reference.squash(x, ctx.dim), (s,), grad, (grad_grad,))
    return *gradients, None, None


def shards(s: Any, dim: int, *_: Any) -> list[Shards]:
    """Any axis but the one along which a vector lies."""
    return [((axis,), {"s": axis}) for axis in range(s.ndim) if axis != dim]


def shards_backward(grad: Any, s: Any, dim: int, *_: Any) -> list[Shards]:
    return [((axis,), {"grad": axis, "s": axis}) for axis in range(s.ndim) if axis != dim]


call = register("squash", SCHEMA, kernel, fake, (gradient, save), shards=shards, autocast=True)
call_backward = register(
    "squash_backward",
    BACKWARD_SCHEMA,
    kernel_backward,
    fake_backward,
    (second_gradient, save_backward),
    shards=shards_backward,
)
