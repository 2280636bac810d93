"""The C++ kernels of csrc/cpu, for tensors on the CPU."""

import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from capsops import reference
from capsops.backends import extension
from capsops.backends.backend import ALL_OPTIONS, Backend, by_name
from capsops.backends.extension import memory, routing_options, vectors

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
    options: tuple | None,
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
    _cpu.routing(  # memory() is written out where it can be: tiny layers notice each call
        (u.data_ptr(), u.nbytes),
        memory(weight),
        memory(bias),
        (v.data_ptr(), v.nbytes),
        (s.data_ptr(), s.nbytes),
        options,
        *shape,
        iterations,
        leaky,
        squash_output,
        _DTYPES[dtype],
        torch.get_num_threads(),
    )
    return v, s


def _route_backward(
    grad: Tensor,
    u: Tensor,
    weight: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    s: Tensor,
    shape: tuple[int, ...],
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    needs_u: bool,
    needs_weight: bool,
    needs_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """∂u (or ∂û), ∂W, ∂β and ∂logits; `shape` is (B, I, J, D, K)."""
    shared = u.dim() == 3 if weight is None else weight.dim() == 3
    grad_u = _like(u, needs_u)
    grad_weight = None if weight is None else _like(weight, needs_weight)
    grad_logits = None if logits is None or not needs_logits else u.new_empty(logits.shape)
    grad_bias = u.new_empty(*shape[2:4])  # with a tuple it takes longer
    _cpu.routing_backward(
        memory(grad),
        memory(u),
        memory(weight),
        memory(s),
        memory(grad_u),
        memory(grad_weight),
        memory(grad_bias),
        routing_options(logits, mask, shared, grad_logits),
        *shape,
        iterations,
        leaky,
        detach,
        squash_output,
        _DTYPES[u.dtype],
        torch.get_num_threads(),
    )
    return _or_empty(grad_u, u), _or_empty(grad_weight, u), grad_bias, _or_empty(grad_logits, u)


def dynamic_routing(
    u_hat: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    squash_output: bool,
) -> tuple[Tensor, Tensor]:
    batch, in_capsules, *_, dim = u_hat.shape
    capsules = reference.out_capsules(u_hat, bias, logits)
    options = routing_options(logits, mask, u_hat.dim() == 3)
    shape = batch, in_capsules, capsules, dim, 1
    return _route(u_hat, None, bias, options, shape, iterations, leaky, squash_output)


def dynamic_routing_backward(
    grad: Tensor,
    u_hat: Tensor,
    logits: Tensor | None,
    mask: Tensor | None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    needs_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = *u_hat.shape[:2], *grad.shape[1:], 1
    settings = iterations, leaky, detach, squash_output
    grad_u_hat, _, grad_bias, grad_logits = _route_backward(
        grad, u_hat, None, logits, mask, s, shape, *settings, True, False, needs_logits
    )
    return grad_u_hat, grad_bias, grad_logits


def _shape(u: Tensor, weight: Tensor) -> tuple[int, ...]:
    return *u.shape[:2], *weight.shape[-3:]


def capsule_routing(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    squash_output: bool,
) -> tuple[Tensor, Tensor]:
    options = routing_options(logits, mask, weight.dim() == 3)
    return _route(u, weight, bias, options, _shape(u, weight), iterations, leaky, squash_output)


def capsule_routing_backward(
    grad: Tensor,
    u: Tensor,
    weight: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings = iterations, leaky, detach, squash_output
    return _route_backward(
        grad, u, weight, logits, mask, s, _shape(u, weight), *settings, needs_u, needs_weight, needs_logits
    )


def couplings(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
) -> Tensor:
    batch, in_capsules, capsules, _, _ = shape = _shape(u, weight)
    c = u.new_empty(batch, in_capsules, capsules)
    if iterations <= 1 and logits is None:
        c = c.fill_(1 if iterations == 0 else 1 / (capsules + leaky))
        return c if mask is None else c.masked_fill_(~mask.unsqueeze(2), 0)
    _cpu.couplings(
        memory(u),
        memory(weight),
        memory(bias),
        memory(c),
        routing_options(logits, mask, weight.dim() == 3),
        *shape,
        iterations,
        leaky,
        _DTYPES[u.dtype],
        torch.get_num_threads(),
    )
    return c


@lru_cache
def _code() -> str:
    return extension.code_hash(_cpu, __file__)


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
    options=ALL_OPTIONS,
    unavailable=_unavailable,
    kernels=lambda device: _cpu.isa(),
    code=_code,
)
