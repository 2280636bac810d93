"""Shapes, options, inputs and memory layouts that the tests of several ops share."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from capsops.measuring.trials import Shape


class Options(NamedTuple):
    iterations: int
    leaky: bool = False
    detach: bool = False
    bias: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("leaky", "detach", "bias") if getattr(self, name)]
        return "-".join([f"T{self.iterations}", *flags])

    def keywords(self) -> dict[str, int | bool]:
        return {"iterations": self.iterations, "leaky": self.leaky, "detach": self.detach}


# Sizes that fill vectors, tiles and threads unevenly, and the round ones that kernels are written for.
SHAPES = [
    Shape(*sizes)
    for sizes in (
        (1, 1, 1, 1, 1),
        (1, 33, 11, 17, 3),
        (1, 100, 10, 16, 8),
        (2, 3, 40, 32, 4),
        (2, 7, 2, 3, 5),
        (2, 100, 11, 32, 17),
        (3, 5, 200, 16, 8),
        (5, 7, 2, 17, 32),
        (5, 33, 10, 16, 8),
        (8, 257, 3, 4, 8),
        (15, 1, 2, 1, 1),
        (15, 7, 11, 4, 4),
        (16, 1, 10, 16, 8),
        (16, 33, 10, 16, 8),
        (17, 100, 2, 8, 16),
        (33, 7, 10, 5, 3),
        (33, 33, 1, 16, 16),
        (63, 7, 2, 32, 5),
        (63, 33, 11, 8, 4),
        (64, 2, 5, 8, 8),
        (130, 9, 10, 16, 8),
    )
]

ALL_OPTIONS = [Options(*option) for option in product(range(5), *[(False, True)] * 3)]

# Every shape is tested with these, two shapes with all of them.
FEW_OPTIONS = [
    Options(0, bias=True),
    Options(1, leaky=True),
    Options(2, leaky=True, detach=True, bias=True),
    Options(3, bias=True),
    Options(4, detach=True),
]

GRID = [
    *product(SHAPES, FEW_OPTIONS),
    *product([Shape(5, 9, 3, 4, 2), Shape(17, 6, 10, 16, 8)], ALL_OPTIONS),
]


def layer_inputs(
    shape: Shape, bias: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor | None]:
    """u, weight and bias of a layer whose predictions and logits are of order 1."""
    u = torch.randn(shape.B, shape.I, shape.K, dtype=torch.float64)
    weight = torch.randn(shape.I, shape.J, shape.D, shape.K, dtype=torch.float64) / shape.K**0.5
    beta = torch.randn(shape.J, shape.D, dtype=torch.float64) / 3 if bias else None
    return u.to(dtype), weight.to(dtype), None if beta is None else beta.to(dtype)


def routing_inputs(
    shape: Shape, bias: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor | None]:
    """û and bias, of order 1."""
    u_hat = torch.randn(shape.B, shape.I, shape.J, shape.D, dtype=torch.float64)
    beta = torch.randn(shape.J, shape.D, dtype=torch.float64) / 3 if bias else None
    return u_hat.to(dtype), None if beta is None else beta.to(dtype)


def to_tf32(x: Tensor) -> Tensor:
    """x rounded to TF32 (10 mantissa bits), as tensor cores round operands; the gradient is rounded too."""
    bits = (x.detach().view(torch.int32) + 0x1000) & ~0x1FFF
    rounded = x + (bits.view(torch.float32) - x).detach()
    if rounded.requires_grad:
        rounded.register_hook(to_tf32)
    return rounded


def value_and_gradients(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    upstream: Tensor | Callable[[Tensor], Tensor] | None = None,
    needs: Sequence[bool] | None = None,
) -> dict[str, Tensor]:
    """{"value": …, "gradient 0": …, …}: the result of `function(*inputs)` and the gradient of each input.

    The inputs keep their strides. `upstream` is the gradient of the result, or a function that computes it
    from the result; by default it is random, and the same in every call whose result has this shape. `needs`
    selects the inputs that require a gradient, by default all but a mask; no other input has one in the
    returned dict.
    """
    if needs is None:
        needs = [x is not None and x.is_floating_point() for x in inputs]
    leaves = [
        x.detach().requires_grad_(need) if x is not None else None
        for x, need in zip(inputs, needs, strict=True)
    ]
    value = function(*leaves)
    if upstream is None:
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
    elif not isinstance(upstream, Tensor):
        upstream = upstream(value.detach())
    differentiable = {f"gradient {n}": x for n, x in enumerate(leaves) if x is not None and x.requires_grad}
    gradients: Sequence[Tensor] = ()
    if differentiable:  # zeros for starting logits that have no effect
        gradients = torch.autograd.grad(
            value, list(differentiable.values()), upstream, materialize_grads=True
        )
    return {"value": value.detach(), **dict(zip(differentiable, gradients, strict=True))}


def runs_in_other_orders(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    axes: Sequence[int | None],
    upstream: Tensor | None,
    needs: Sequence[bool] | None = None,
    value_axis: int | None = None,
) -> list[dict[str, Tensor]]:
    """value_and_gradients for four orders of the input capsules; `axes` is their axis in each input, or None.

    `value_axis` is their axis in the value. The results are in the order of the inputs, so that the runs
    differ only by rounding.
    """
    count = inputs[0].shape[axes[0]]
    runs = []
    for order in (torch.arange(count), torch.arange(count).flip(0), *map(torch.randperm, (count, count))):
        ordered = [
            x if x is None or axis is None else x.index_select(axis, order)
            for x, axis in zip(inputs, axes, strict=True)
        ]
        run = value_and_gradients(function, ordered, upstream, needs)
        if value_axis is not None:
            run["value"] = run["value"].index_select(value_axis, order.argsort())
        for n, axis in enumerate(axes):
            if axis is not None and f"gradient {n}" in run:
                run[f"gradient {n}"] = run[f"gradient {n}"].index_select(axis, order.argsort())
        runs.append(run)
    return runs


def _sliced(x: Tensor) -> Tensor:
    """A view of every second element of a larger tensor's last axis, with NaN between and around them."""
    wide = torch.full((x.shape[0] + 2, *x.shape[1:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    view = wide[1:-1, ..., ::2]
    view.copy_(x)
    return view


def _offset(x: Tensor) -> Tensor:
    """Contiguous, but one element past an aligned address, with NaN on both sides."""
    line = torch.full((x.numel() + 2,), float("nan"), dtype=x.dtype)
    view = line[1:-1].view(x.shape)
    view.copy_(x)
    return view


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _expanded(x: Tensor) -> Tensor:
    """x[0] repeated along the first axis with stride 0."""
    return x[:1].expand_as(x)


def _constant(x: Tensor) -> Tensor:
    """One number repeated with stride 0 along every axis, like the gradient of a sum."""
    return x.flatten()[0].expand_as(x)


# Each returns a tensor in another memory layout; all but the last two keep its values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced": _sliced,
    "offset": _offset,
    "transposed": _transposed,
    "expanded": _expanded,
    "constant": _constant,
}

LOW_PRECISION = [torch.float32, torch.bfloat16, torch.float16]
