"""An op that does nothing, registered with torch.library as capsops' ops are: what a call costs by itself."""

from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("capsops_benchmarks", "DEF")


def _empty(u: Tensor, weight: Tensor) -> Tensor:
    return u.new_empty(u.shape[0], *weight.shape[1:3])


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    u, weight = ctx.saved_tensors
    return torch.ops.capsops_benchmarks.empty_backward(grad, u, weight)


_library.define("empty(Tensor u, Tensor weight) -> Tensor")
_library.define("empty_backward(Tensor grad, Tensor u, Tensor weight) -> (Tensor, Tensor)")
_library.impl("empty", _empty, "CompositeExplicitAutograd")
_library.impl(
    "empty_backward",
    lambda grad, u, weight: (torch.empty_like(u), torch.empty_like(weight)),
    "CompositeExplicitAutograd",
)
torch.library.register_autograd("capsops_benchmarks::empty", _backward, setup_context=_setup, lib=_library)

empty = torch.ops.capsops_benchmarks.empty
