"""The ops and their gradients in closed form, in plain PyTorch, with û in memory, for every device.

Forward: V⁰ = 0; cᵗ = softmax_j(û · Vᵗ⁻¹), sᵗ = Σ_i cᵗ û + β, Vᵗ = Vᵗ⁻¹ + squash(sᵗ).
Backward, for t = T…1: ∂sᵗ = squash-vjp(sᵗ, ∂vᵗ), a = û · ∂sᵗ, ∂b = c (a − Σ_j c a), ∂Vᵗ⁻¹ = ∂Vᵗ + Σ_i ∂b û;
then ∂û = Σ_t (cᵗ ∂sᵗ + ∂bᵗ Vᵗ⁻¹). 16-bit tensors are computed in float32.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from capsops import reference
from capsops.backends.backend import UNSQUASHED, Backend, accumulation_dtype, by_name


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))


def squash(s: Tensor, dim: int) -> Tensor:
    return reference.squash(_wide(s), dim).to(s.dtype)


def _squash_vjp(grad: Tensor, s: Tensor, dim: int) -> Tensor:
    """f g + (f′/r) (s·g) s, f = r/(1+r²), f′ = (1−r²)/(1+r²)². With n = s/r: f g + r f′ (n·g) n."""
    if s.numel() == 0:
        return torch.zeros_like(s)
    scale = s.abs().amax(dim, keepdim=True)
    scale = torch.where(scale > 0, scale, 1)
    x = s / scale
    length = x.square().sum(dim, keepdim=True).sqrt()
    r = scale * length
    n = x / torch.where(length == 0, 1, length)
    small, large = r.clamp(max=1), r.clamp(min=1)
    f = torch.where(r > 1, 1 / (large + 1 / large), small / (1 + small**2))
    q = torch.where(r > 1, 1 / large, small)
    slope = q * (1 - q**2) / (1 + q**2) ** 2  # r f′, which changes its sign under r → 1/r
    slope = torch.where(r > 1, -slope, slope)
    return f * grad + slope * (n * grad).sum(dim, keepdim=True) * n


def squash_backward(grad: Tensor, s: Tensor, dim: int) -> Tensor:
    return _squash_vjp(_wide(grad), _wide(s), dim).to(s.dtype)


def predictions(u: Tensor, weight: Tensor) -> Tensor:
    return reference.predictions(_wide(u), _wide(weight)).to(u.dtype)


def predictions_backward(
    grad: Tensor, u: Tensor, weight: Tensor, needs_u: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    grad_u, grad_weight = u.new_empty(0), u.new_empty(0)
    if needs_u:
        grad_u = torch.einsum("bijd,ijdk->bik", _wide(grad), _wide(weight)).to(u.dtype)
    if needs_weight:
        grad_weight = torch.einsum("bijd,bik->ijdk", _wide(grad), _wide(u)).to(u.dtype)
    return grad_u, grad_weight


def _couplings(u_hat: Tensor, total_v: Tensor | None, leaky: bool) -> Tensor:
    """c of a pass; without V of the first, whose logits are all 0."""
    if total_v is None:
        return reference.coupling_softmax(u_hat.new_zeros(u_hat.shape[:3]), leaky)
    return reference.coupling_softmax(torch.einsum("bijd,bjd->bij", u_hat, total_v), leaky)


def _routing(
    u_hat: Tensor, bias: Tensor | None, iterations: int, leaky: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """v, sᵗ of all passes and Vᵀ⁻¹, from û in the accumulation dtype."""
    batch, _, out_capsules, dim = u_hat.shape
    v = total_v = u_hat.new_zeros(batch, out_capsules, dim)
    sums = []
    for t in range(max(iterations, 1)):
        if t > 0:
            total_v = total_v + v
        if iterations == 0:
            s = u_hat.sum(1)
        else:
            c = _couplings(u_hat, total_v if t > 0 else None, leaky)
            s = torch.einsum("bij,bijd->bjd", c, u_hat)
        sums.append(s if bias is None else s + bias)
        v = reference.squash(sums[-1])
    return v, torch.stack(sums), total_v


def _routing_backward(
    grad: Tensor, u_hat: Tensor, s: Tensor, iterations: int, leaky: bool, detach: bool, squash_output: bool
) -> tuple[Tensor, Tensor]:
    """∂û and ∂β in the accumulation dtype."""
    if iterations == 0:
        grad_s = _squash_vjp(grad, s[0], -1) if squash_output else grad
        return grad_s.unsqueeze(1).repeat(1, u_hat.shape[1], 1, 1), grad_s.sum(0)
    v = reference.squash(s[:-1])
    total_v = torch.cat([torch.zeros_like(s[:1]), v.cumsum(0)])  # Vᵗ⁻¹ of pass t
    grad_u_hat = torch.zeros_like(u_hat)
    grad_bias = s.new_zeros(s.shape[2:])
    grad_v, grad_total_v = grad, torch.zeros_like(grad)
    for t in reversed(range(iterations)):
        squashed = squash_output or t < iterations - 1
        grad_s = _squash_vjp(grad_v, s[t], -1) if squashed else grad_v
        grad_bias = grad_bias + grad_s.sum(0)
        c = _couplings(u_hat, total_v[t] if t > 0 else None, leaky)
        grad_u_hat = grad_u_hat + c.unsqueeze(-1) * grad_s.unsqueeze(1)
        if detach:
            break
        if t > 0:
            a = torch.einsum("bijd,bjd->bij", u_hat, grad_s)
            grad_b = c * (a - (c * a).sum(-1, keepdim=True))
            grad_u_hat = grad_u_hat + grad_b.unsqueeze(-1) * total_v[t].unsqueeze(1)
            grad_total_v = grad_total_v + torch.einsum("bij,bijd->bjd", grad_b, u_hat)
            grad_v = grad_total_v
    return grad_u_hat, grad_bias


def dynamic_routing(
    u_hat: Tensor, bias: Tensor | None, iterations: int, leaky: bool, squash_output: bool
) -> tuple[Tensor, Tensor]:
    v, s, _ = _routing(_wide(u_hat), None if bias is None else _wide(bias), iterations, leaky)
    return (v if squash_output else s[-1].clone()).to(u_hat.dtype), s


def dynamic_routing_backward(
    grad: Tensor, u_hat: Tensor, s: Tensor, iterations: int, leaky: bool, detach: bool, squash_output: bool
) -> tuple[Tensor, Tensor]:
    grad_u_hat, grad_bias = _routing_backward(
        _wide(grad), _wide(u_hat), s, iterations, leaky, detach, squash_output
    )
    return grad_u_hat.to(u_hat.dtype), grad_bias.to(u_hat.dtype)


def capsule_routing(
    u: Tensor, weight: Tensor, bias: Tensor | None, iterations: int, leaky: bool, squash_output: bool
) -> tuple[Tensor, Tensor]:
    u_hat = reference.predictions(_wide(u), _wide(weight))
    v, s, _ = _routing(u_hat, None if bias is None else _wide(bias), iterations, leaky)
    return (v if squash_output else s[-1].clone()).to(u.dtype), s


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
    wide_u, wide_weight = _wide(u), _wide(weight)
    u_hat = reference.predictions(wide_u, wide_weight)
    grad_u_hat, grad_bias = _routing_backward(_wide(grad), u_hat, s, iterations, leaky, detach, squash_output)
    grad_u, grad_weight = predictions_backward(grad_u_hat, wide_u, wide_weight, needs_u, needs_weight)
    return grad_u.to(u.dtype), grad_weight.to(u.dtype), grad_bias.to(u.dtype)


def couplings(u: Tensor, weight: Tensor, bias: Tensor | None, iterations: int, leaky: bool) -> Tensor:
    u_hat = reference.predictions(_wide(u), _wide(weight))
    if iterations == 0:
        return u.new_ones(u_hat.shape[:3])
    _, _, total_v = _routing(u_hat, None if bias is None else _wide(bias), iterations, leaky)
    return _couplings(u_hat, total_v if iterations > 1 else None, leaky).to(u.dtype)


def _contiguous(function: Callable) -> Callable:
    """The function with contiguous results; einsum may return others."""

    @wraps(function)
    def call(*args: Any) -> Any:
        results = function(*args)
        if isinstance(results, Tensor):
            return results.contiguous()
        return tuple(x.contiguous() for x in results)

    return call


BACKEND = Backend(
    name="reference",
    functions={
        name: _contiguous(function)
        for name, function in by_name(
            squash,
            squash_backward,
            predictions,
            predictions_backward,
            dynamic_routing,
            dynamic_routing_backward,
            capsule_routing,
            capsule_routing_backward,
            couplings,
        ).items()
    },
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    options=frozenset((UNSQUASHED,)),
)
