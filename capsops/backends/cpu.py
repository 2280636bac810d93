"""The ops by the C++ kernels of csrc/cpu: allocates results, passes addresses. Serves CPU tensors."""

import os

import torch
from torch import Tensor

import capsops._cpu as _cpu
from capsops.backends import accumulation_dtype

if os.environ.get("CAPSOPS_CPU_ISA"):
    _cpu.use_isa(os.environ["CAPSOPS_CPU_ISA"])  # a ValueError if this processor has no such thing

_STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def _memory(x: Tensor | None) -> tuple[int, int]:
    """What a kernel is told of a tensor: its address and its bytes."""
    return (0, 0) if x is None else (x.data_ptr(), x.nbytes)


def _like(x: Tensor, needed: bool) -> Tensor | None:
    return torch.empty_like(x) if needed else None


def _given(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


def _extent(s: Tensor, dim: int) -> tuple[int, int, int]:
    """s as [outer, n, inner] with the vectors along n."""
    outer = inner = 1
    for size in s.shape[:dim]:
        outer *= size
    for size in s.shape[dim + 1 :]:
        inner *= size
    return outer, s.shape[dim], inner


def squash(s: Tensor, dim: int) -> Tensor:
    v = torch.empty_like(s)
    _cpu.squash(_memory(s), _memory(v), *_extent(s, dim), _STORAGE[s.dtype], torch.get_num_threads())
    return v


def squash_backward(grad: Tensor, s: Tensor, dim: int) -> Tensor:
    grad_s = torch.empty_like(s)
    _cpu.squash_backward(
        _memory(grad),
        _memory(s),
        _memory(grad_s),
        *_extent(s, dim),
        _STORAGE[s.dtype],
        torch.get_num_threads(),
    )
    return grad_s


def predictions(u: Tensor, weight: Tensor) -> Tensor:
    u_hat = u.new_empty(u.shape[0], *weight.shape[:3])
    _cpu.predictions(
        _memory(u),
        _memory(weight),
        _memory(u_hat),
        u.shape[0],
        *weight.shape,
        _STORAGE[u.dtype],
        torch.get_num_threads(),
    )
    return u_hat


def predictions_backward(
    grad: Tensor, u: Tensor, weight: Tensor, needs_u: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    grad_u, grad_weight = _like(u, needs_u), _like(weight, needs_weight)
    _cpu.predictions_backward(
        _memory(grad),
        _memory(u),
        _memory(weight),
        _memory(grad_u),
        _memory(grad_weight),
        u.shape[0],
        *weight.shape,
        _STORAGE[u.dtype],
        torch.get_num_threads(),
    )
    return _given(grad_u, u), _given(grad_weight, u)


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
    s = u.new_empty(max(iterations, 1), batch, capsules, dim, dtype=accumulation_dtype(u.dtype))
    _cpu.routing(
        _memory(u),
        _memory(weight),
        _memory(bias),
        _memory(v),
        _memory(s),
        *shape,
        iterations,
        leaky,
        squash_output,
        _STORAGE[u.dtype],
        torch.get_num_threads(),
    )
    return v, s


def dynamic_routing(
    u_hat: Tensor, bias: Tensor | None, iterations: int, leaky: bool, squash_output: bool
) -> tuple[Tensor, Tensor]:
    return _route(u_hat, None, bias, (*u_hat.shape, 1), iterations, leaky, squash_output)


def dynamic_routing_backward(
    grad: Tensor, u_hat: Tensor, s: Tensor, iterations: int, leaky: bool, detach: bool, squash_output: bool
) -> tuple[Tensor, Tensor]:
    grad_u_hat, grad_bias = torch.empty_like(u_hat), u_hat.new_empty(u_hat.shape[2:])
    _cpu.routing_backward(
        _memory(grad),
        _memory(u_hat),
        _memory(None),
        _memory(s),
        _memory(grad_u_hat),
        _memory(None),
        _memory(grad_bias),
        *u_hat.shape,
        1,
        iterations,
        leaky,
        detach,
        squash_output,
        _STORAGE[u_hat.dtype],
        torch.get_num_threads(),
    )
    return grad_u_hat, grad_bias


def capsule_routing(
    u: Tensor, weight: Tensor, bias: Tensor | None, iterations: int, leaky: bool, squash_output: bool
) -> tuple[Tensor, Tensor]:
    return _route(u, weight, bias, (u.shape[0], *weight.shape), iterations, leaky, squash_output)


def capsule_routing_backward(
    grad: Tensor,
    u: Tensor,
    weight: Tensor,
    s: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    needs_u: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_u, grad_weight = _like(u, needs_u), _like(weight, needs_weight)
    grad_bias = u.new_empty(weight.shape[1:3])
    _cpu.routing_backward(
        _memory(grad),
        _memory(u),
        _memory(weight),
        _memory(s),
        _memory(grad_u),
        _memory(grad_weight),
        _memory(grad_bias),
        u.shape[0],
        *weight.shape,
        iterations,
        leaky,
        detach,
        squash_output,
        _STORAGE[u.dtype],
        torch.get_num_threads(),
    )
    return _given(grad_u, u), _given(grad_weight, u), grad_bias


def couplings(u: Tensor, weight: Tensor, bias: Tensor | None, iterations: int, leaky: bool) -> Tensor:
    c = u.new_empty(u.shape[0], *weight.shape[:2])
    if iterations <= 1:
        return c.fill_(1 if iterations == 0 else 1 / (weight.shape[1] + leaky))
    _cpu.couplings(
        _memory(u),
        _memory(weight),
        _memory(bias),
        _memory(c),
        u.shape[0],
        *weight.shape,
        iterations,
        leaky,
        _STORAGE[u.dtype],
        torch.get_num_threads(),
    )
    return c
