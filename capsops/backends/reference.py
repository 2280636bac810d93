"""The ops and their gradients in closed form, in plain PyTorch, for every device.

Forward: V⁰ = 0; cᵗ = softmax_j(ℓ + û · Vᵗ⁻¹), sᵗ = Σ_i cᵗ û + β, Vᵗ = Vᵗ⁻¹ + squash(sᵗ); ℓ are the logits.
Backward, for t = T…1: ∂sᵗ = squash-vjp(sᵗ, ∂vᵗ), a = û · ∂sᵗ, ∂b = c (a − Σ_j c a), ∂Vᵗ⁻¹ = ∂Vᵗ + Σ_i ∂b û;
then ∂û = Σ_t (cᵗ ∂sᵗ + ∂bᵗ Vᵗ⁻¹) and ∂ℓ = Σ_t ∂bᵗ. û is in memory, unless the weight is shared. 16-bit
tensors are computed in float32.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from capsops import reference
from capsops.backends.backend import ALL_OPTIONS, Backend, accumulation_dtype, by_name


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


class _StoredPredictions:
    """û [B, I, J, D] in memory."""

    def __init__(self, u_hat: Tensor) -> None:
        self.u_hat = u_hat
        self.pairs = u_hat.shape[:3]

    def agreements(self, x: Tensor) -> Tensor:
        """û · x [B, I, J] for x [B, J, D]."""
        return torch.einsum("bijd,bjd->bij", self.u_hat, x)

    def weighted_sum(self, c: Tensor) -> Tensor:
        """Σ_i c û [B, J, D] for c [B, I, J]."""
        return torch.einsum("bij,bijd->bjd", c, self.u_hat)

    def gradient(self, terms: list[tuple[Tensor, Tensor]]) -> Tensor:
        """∂û = Σ c x of terms c [B, I, J] and x [B, J, D]."""
        return sum((c.unsqueeze(-1) * x.unsqueeze(1) for c, x in terms), torch.zeros_like(self.u_hat))


class _SharedPredictions:
    """û_ij = W_j u_i, which is never formed: û · x = u · (Wᵀ x), and Σ_i c û = W (Σ_i c u).

    Without W each W_j is 1, and û_ij = u_i.
    """

    def __init__(self, u: Tensor, weight: Tensor | None, out_capsules: int) -> None:
        self.u, self.weight = u, weight
        self.pairs = (*u.shape[:2], out_capsules)

    def _projected(self, x: Tensor) -> Tensor:
        """Wᵀ x [B, J, K]."""
        return x if self.weight is None else torch.einsum("jdk,bjd->bjk", self.weight, x)

    def agreements(self, x: Tensor) -> Tensor:
        return torch.einsum("bik,bjk->bij", self.u, self._projected(x))

    def weighted_sum(self, c: Tensor) -> Tensor:
        z = torch.einsum("bij,bik->bjk", c, self.u)
        return z if self.weight is None else torch.einsum("jdk,bjk->bjd", self.weight, z)

    def gradient(self, terms: list[tuple[Tensor, Tensor]]) -> Tensor:
        """∂u = Σ_j W_jᵀ ∂û."""
        parts = (torch.einsum("bij,bjk->bik", c, self._projected(x)) for c, x in terms)
        return sum(parts, torch.zeros_like(self.u))

    def weight_gradient(self, terms: list[tuple[Tensor, Tensor]]) -> Tensor:
        """∂W_j = Σ_b x (Σ_i c u)ᵀ."""
        sums = [(x, torch.einsum("bij,bik->bjk", c, self.u)) for c, x in terms]
        return torch.stack([torch.einsum("bjd,bjk->jdk", x, z) for x, z in sums]).sum(0)


def _present(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [B, I, …], 0 where an input capsule is absent."""
    return x if mask is None else torch.where(mask[(...,) + (None,) * (x.dim() - 2)], x, 0)


def _sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    """x summed over the axes that are 1 in `shape`."""
    axes = [axis for axis, size in enumerate(shape) if size == 1 and x.shape[axis] != 1]
    return x.sum(axes, keepdim=True) if axes else x


class _Routing:
    """Routing of the predictions of one call, in the accumulation dtype."""

    def __init__(
        self,
        u_hat: _StoredPredictions | _SharedPredictions,
        logits: Tensor | None,
        iterations: int,
        leaky: bool,
    ) -> None:
        self.u_hat, self.iterations, self.leaky = u_hat, iterations, leaky
        self.logits = None if logits is None else _wide(logits)

    def couplings(self, total_v: Tensor, first: bool) -> Tensor:
        """c of a pass, from its V; that of the first is 0."""
        b = total_v.new_zeros(self.u_hat.pairs) if first else self.u_hat.agreements(total_v)
        if self.logits is not None:
            b = b + self.logits
            return reference.closable_softmax(b, self.leaky) if self.iterations else reference.open_pairs(b)
        return reference.coupling_softmax(b, self.leaky) if self.iterations else torch.ones_like(b)

    def forward(self, like: Tensor, out_dim: int, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """v, sᵗ of all passes and Vᵀ⁻¹."""
        batch, _, out_capsules = self.u_hat.pairs
        v = total_v = like.new_zeros(batch, out_capsules, out_dim, dtype=accumulation_dtype(like.dtype))
        sums = []
        for t in range(max(self.iterations, 1)):
            if t > 0:
                total_v = total_v + v
            s = self.u_hat.weighted_sum(self.couplings(total_v, t == 0))
            sums.append(s if bias is None else s + _wide(bias))
            v = reference.squash(sums[-1])
        return v, torch.stack(sums), total_v

    def results(
        self, like: Tensor, out_dim: int, bias: Tensor | None, squash_output: bool
    ) -> tuple[Tensor, Tensor]:
        v, s, _ = self.forward(like, out_dim, bias)
        return (v if squash_output else s[-1].clone()).to(like.dtype), s

    def backward(
        self, grad: Tensor, s: Tensor, detach: bool, squash_output: bool
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
        """The terms c x of ∂û; ∂β; ∂ℓ [B, I, J]."""
        grad = _wide(grad)
        total_v = torch.cat([torch.zeros_like(s[:1]), reference.squash(s[:-1]).cumsum(0)])  # Vᵗ⁻¹ of pass t
        grad_bias, grad_logits = s.new_zeros(s.shape[2:]), s.new_zeros(self.u_hat.pairs)
        grad_v, grad_total_v = grad, torch.zeros_like(grad)
        terms = []
        for t in reversed(range(len(s))):
            squashed = squash_output or t < len(s) - 1
            grad_s = _squash_vjp(grad_v, s[t], -1) if squashed else grad_v
            grad_bias = grad_bias + grad_s.sum(0)
            c = self.couplings(total_v[t], t == 0)
            terms.append((c, grad_s))
            if self.iterations and not (detach and self.logits is None):
                a = self.u_hat.agreements(grad_s)
                grad_b = c * (a - (c * a).sum(-1, keepdim=True))
                grad_logits = grad_logits + grad_b
            if detach:
                break
            if t > 0:
                terms.append((grad_b, total_v[t]))
                grad_total_v = grad_total_v + self.u_hat.weighted_sum(grad_b)
                grad_v = grad_total_v
        return terms, grad_bias, grad_logits

    def logits_gradient(self, grad_logits: Tensor, like: Tensor, needed: bool) -> Tensor:
        if not needed or self.logits is None:
            return like.new_empty(0)
        return _sum_to(grad_logits, self.logits.shape).to(like.dtype)


def _predictions(u: Tensor, weight: Tensor, mask: Tensor | None) -> _StoredPredictions | _SharedPredictions:
    u, weight = _present(_wide(u), mask), _wide(weight)
    if weight.dim() == 3:
        return _SharedPredictions(u, weight, weight.shape[0])
    return _StoredPredictions(reference.predictions(u, weight))


def _precomputed(
    u_hat: Tensor, out_capsules: int, mask: Tensor | None
) -> _StoredPredictions | _SharedPredictions:
    u_hat = _present(_wide(u_hat), mask)
    return _StoredPredictions(u_hat) if u_hat.dim() == 4 else _SharedPredictions(u_hat, None, out_capsules)


def dynamic_routing(
    u_hat: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    squash_output: bool,
) -> tuple[Tensor, Tensor]:
    predictions = _precomputed(u_hat, reference.out_capsules(u_hat, bias, logits), mask)
    routing = _Routing(predictions, logits, iterations, leaky)
    return routing.results(u_hat, u_hat.shape[-1], bias, squash_output)


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
    predictions = _precomputed(u_hat, s.shape[2], mask)
    routing = _Routing(predictions, logits, iterations, leaky)
    terms, grad_bias, grad_logits = routing.backward(grad, s, detach, squash_output)
    return (
        _present(predictions.gradient(terms), mask).to(u_hat.dtype),
        grad_bias.to(u_hat.dtype),
        routing.logits_gradient(grad_logits, u_hat, needs_logits),
    )


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
    routing = _Routing(_predictions(u, weight, mask), logits, iterations, leaky)
    return routing.results(u, weight.shape[-2], bias, squash_output)


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
    predictions = _predictions(u, weight, mask)
    routing = _Routing(predictions, logits, iterations, leaky)
    terms, grad_bias, grad_logits = routing.backward(grad, s, detach, squash_output)
    grad_u, grad_weight = u.new_empty(0), u.new_empty(0)
    if isinstance(predictions, _SharedPredictions):
        if needs_u:
            grad_u = predictions.gradient(terms)
        if needs_weight:
            grad_weight = predictions.weight_gradient(terms)
    else:
        grad_u, grad_weight = predictions_backward(
            predictions.gradient(terms), _present(_wide(u), mask), _wide(weight), needs_u, needs_weight
        )
    return (
        _present(grad_u, mask if needs_u else None).to(u.dtype),
        grad_weight.to(u.dtype),
        grad_bias.to(u.dtype),
        routing.logits_gradient(grad_logits, u, needs_logits),
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
    routing = _Routing(_predictions(u, weight, mask), logits, iterations, leaky)
    _, _, total_v = routing.forward(u, weight.shape[-2], bias)
    return _present(routing.couplings(total_v, iterations <= 1).to(u.dtype), mask)


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
    options=ALL_OPTIONS,
)
