"""The C++ kernels of csrc/cpu, for tensors on the CPU."""

import os
from typing import Any

import torch
from torch import Tensor

from capsops.backends import extension
from capsops.backends.backend import UNSQUASHED, Backend, by_name
from capsops.backends.extension import memory, vectors

_cpu: Any
_cpu, _unavailable = extension.load("cpu")
if _cpu is not None and os.environ.get("CAPSOPS_CPU_ISA"):
    _cpu.use_isa(os.environ["CAPSOPS_CPU_ISA"])  # a ValueError where this processor does not have it

# The numbers by which the extension knows the dtypes.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def _like(x: Tensor, needed: bool) -> Tensor | None:
    return torch.empty_like(x) if needed else None


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


def squash(s: Tensor, dim: int) -> Tensor:
    v = torch.empty_like(s)
    _cpu.squash(memory(s), memory(v), *vectors(s, dim), _DTYPES[s.dtype], torch.get_num_threads())
    return v


def squash_backward(grad: Tensor, s: Tensor, dim: int) -> Tensor:
    grad_s = torch.empty_like(s)
    _cpu.squash_backward(
        memory(grad),
        memory(s),
        memory(grad_s),
        *vectors(s, dim),
        _DTYPES[s.dtype],
        torch.get_num_threads(),
    )
    return grad_s


def predictions(u: Tensor, weight: Tensor) -> Tensor:
    u_hat = u.new_empty(u.shape[0], *weight.shape[:3])
    _cpu.predictions(
        memory(u),
        memory(weight),
        memory(u_hat),
        u.shape[0],
        *weight.shape,
        _DTYPES[u.dtype],
        torch.get_num_threads(),
    )
    return u_hat


def predictions_backward(
    grad: Tensor, u: Tensor, weight: Tensor, needs_u: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    grad_u, grad_weight = _like(u, needs_u), _like(weight, needs_weight)
    _cpu.predictions_backward(
        memory(grad),
        memory(u),
        memory(weight),
        memory(grad_u),
        memory(grad_weight),
        u.shape[0],
        *weight.shape,
        _DTYPES[u.dtype],
        torch.get_num_threads(),
    )
    return _or_empty(grad_u, u), _or_empty(grad_weight, u)


def _route(
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, ...],
    iterations: int,
    leaky: bool,
    squash_output: bool,
) -> tuple[Tensor, Tensor]:
    """v and s of all passes; `shape` is (B, I, J, D, K)."""
    batch, _, capsules, dim, _ = shape
    v = u.new_empty(batch, capsules, dim)
    dtype, passes = u.dtype, max(iterations, 1)
    if dtype is torch.float32 or dtype is torch.float64:  # with a dtype, new_empty() takes twice as long
        s = u.new_empty(passes, batch, capsules, dim)
    else:
        s = u.new_empty(passes, batch, capsules, dim, dtype=torch.float32)
    _cpu.routing(  # without memory() where it can be: for a tiny layer every call of a function counts
        (u.data_ptr(), u.nbytes),
        memory(weight),
        memory(bias),
        (v.data_ptr(), v.nbytes),
        (s.data_ptr(), s.nbytes),
        *shape,
        iterations,
        leaky,
        squash_output,
        _DTYPES[dtype],
        torch.get_num_threads(),
    )
    return v, s


def dynamic_routing(
    u_hat: Tensor,
    bias: Tensor | None,
    logits: None,
    mask: None,
    iterations: int,
    leaky: bool,
    squash_output: bool,
) -> tuple[Tensor, Tensor]:
    return _route(u_hat, None, bias, (*u_hat.shape, 1), iterations, leaky, squash_output)


def dynamic_routing_backward(
    grad: Tensor,
    u_hat: Tensor,
    logits: None,
    mask: None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    needs_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_u_hat, grad_bias = torch.empty_like(u_hat), u_hat.new_empty(u_hat.shape[2:])
    _cpu.routing_backward(
        memory(grad),
        memory(u_hat),
        memory(None),
        memory(s),
        memory(grad_u_hat),
        memory(None),
        memory(grad_bias),
        *u_hat.shape,
        1,
        iterations,
        leaky,
        detach,
        squash_output,
        _DTYPES[u_hat.dtype],
        torch.get_num_threads(),
    )
    return grad_u_hat, grad_bias, u_hat.new_empty(0)


def capsule_routing(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: None,
    mask: None,
    iterations: int,
    leaky: bool,
    squash_output: bool,
) -> tuple[Tensor, Tensor]:
    return _route(u, weight, bias, (u.shape[0], *weight.shape), iterations, leaky, squash_output)


def capsule_routing_backward(
    grad: Tensor,
    u: Tensor,
    weight: Tensor,
    logits: None,
    mask: None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    needs_u: bool,
    needs_weight: bool,
    needs_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_u, grad_weight = _like(u, needs_u), _like(weight, needs_weight)
    grad_bias = u.new_empty(weight.shape[1:3])
    _cpu.routing_backward(
        memory(grad),
        memory(u),
        memory(weight),
        memory(s),
        memory(grad_u),
        memory(grad_weight),
        memory(grad_bias),
        u.shape[0],
        *weight.shape,
        iterations,
        leaky,
        detach,
        squash_output,
        _DTYPES[u.dtype],
        torch.get_num_threads(),
    )
    return _or_empty(grad_u, u), _or_empty(grad_weight, u), grad_bias, u.new_empty(0)


def couplings(
    u: Tensor, weight: Tensor, bias: Tensor | None, logits: None, mask: None, iterations: int, leaky: bool
) -> Tensor:
    c = u.new_empty(u.shape[0], *weight.shape[:2])
    if iterations <= 1:
        return c.fill_(1 if iterations == 0 else 1 / (weight.shape[1] + leaky))
    _cpu.couplings(
        memory(u),
        memory(weight),
        memory(bias),
        memory(c),
        u.shape[0],
        *weight.shape,
        iterations,
        leaky,
        _DTYPES[u.dtype],
        torch.get_num_threads(),
    )
    return c


BACKEND = Backend(
    name="cpu",
    functions=by_name(
        squash,
        squash_backward,
        predictions,
        predictions_backward,
        dynamic_routing,
        dynamic_routing_backward,
        capsule_routing,
        capsule_routing_backward,
        couplings,
    ),
    devices=("cpu",),
    dtypes=tuple(_DTYPES),
    options=frozenset((UNSQUASHED,)),
    unavailable=_unavailable,
)
