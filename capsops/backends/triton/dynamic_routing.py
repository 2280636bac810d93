"""Routing of precomputed predictions û [B, I, J, D]: every pass reads û once, from memory or from the cache.

Forward, for t = 1…T: cᵗ = softmax_j(û · Vᵗ⁻¹), sᵗ = Σ_i cᵗ û + β, Vᵗ = Vᵗ⁻¹ + squash(sᵗ).
Backward: for t = T…2, a = û · ∂sᵗ, ∂b = c (a − Σ_j c a), ∂Vᵗ⁻¹ = ∂Vᵗ + Σ_i ∂b û; then
∂û = Σ_t (cᵗ ∂sᵗ + ∂bᵗ Vᵗ⁻¹).

A block is [C input capsules, JB output capsules, DP components] of one sample. Where it has all j, û is
loaded once; else a first loop over j keeps the largest logit, Σ exp and Σ c a of each i in registers, and a
second loop reads û from the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from capsops.backends.triton import launch_configs, reductions
from capsops.backends.triton.capsules import load_if, power
from capsops.backends.triton.launch import launch, on_device
from capsops.backends.triton.launch_configs import ceil_div
from capsops.backends.triton.softmax import softmax


@triton.jit
def _load(p_x, row, m_row, j, J: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Capsules j of the rows, which begin at `row`, in float32: [rows, JB, DP]."""
    d = tl.arange(0, DP)
    mask = m_row[:, None, None] & (j < J)[None, :, None] & (d < D)[None, None, :]
    p = p_x + row[:, None, None] + (j * D)[None, :, None] + d[None, None, :]
    return tl.load(p, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_one(p_x, j, J: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Capsules j of one sample: [1, JB, DP]."""
    d = tl.arange(0, DP)
    mask = (j < J)[:, None] & (d < D)[None, :]
    return tl.load(p_x + (j * D)[:, None] + d[None, :], mask=mask, other=0.0)[None, :, :]


@triton.jit
def _logits(b_u_hat, b_v, j, J: tl.constexpr):
    """û · V [C, JB], −∞ beyond the last j."""
    return tl.where((j < J)[None, :], tl.sum(b_u_hat * b_v, 2), -float("inf"))


@triton.jit
def _statistics(
    p_u_hat, p_v, p_grad_s, row, m_row, C: tl.constexpr, J: tl.constexpr, D: tl.constexpr, JB: tl.constexpr,
    DP: tl.constexpr, LEAKY: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Of each i: the largest logit, 1 / Σ_j exp(b − largest) and, with GRADIENT, Σ_j c a; all [C]."""
    top = tl.full([C], -float("inf"), tl.float32)
    z = tl.zeros([C], tl.float32)
    mean = tl.zeros([C], tl.float32)
    if LEAKY:
        top = tl.zeros([C], tl.float32)
        z = tl.full([C], 1.0, tl.float32)
    for first in range(0, J, JB):
        j = first + tl.arange(0, JB)
        b_u_hat = _load(p_u_hat, row, m_row, j, J, D, DP)
        b = _logits(b_u_hat, _load_one(p_v, j, J, D, DP), j, J)
        higher = tl.maximum(top, tl.max(b, 1))
        shrink = tl.exp(top - higher)
        e = power(b - higher[:, None])
        z = z * shrink + tl.sum(e, 1)
        if GRADIENT:
            a = tl.sum(b_u_hat * _load_one(p_grad_s, j, J, D, DP), 2)
            mean = mean * shrink + tl.sum(e * a, 1)
        top = higher
    return top, 1.0 / z, mean / z


@triton.jit(do_not_specialize=["B", "I", "parts", "size"])
def precomputed_pass_kernel(
    p_u_hat, p_total, p_grad_s, p_partials, B, I, parts, size,
    J: tl.constexpr, D: tl.constexpr, C: tl.constexpr, JB: tl.constexpr, DP: tl.constexpr,
    UNIFORM: tl.constexpr, LEAKY: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Σ_i û (UNIFORM), Σ_i c û or, with GRADIENT, Σ_i ∂b û, over `size` input capsules of one sample."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // parts
    part = pid % parts
    p_total = p_total + b * (J * D)
    p_grad_s = p_grad_s + b * (J * D)
    d = tl.arange(0, DP)
    begin = part * size
    end = tl.minimum(begin + size, I)
    p_sum = p_partials + (part * B + b) * (J * D)
    if UNIFORM or J <= JB:
        # One block of j at a time, its sum in registers; for a routed pass there is one only.
        for first in range(0, J, JB):
            j = first + tl.arange(0, JB)
            b_sum = tl.zeros([C, JB, DP], tl.float32)
            if not UNIFORM:
                b_v = _load_one(p_total, j, J, D, DP)
                if GRADIENT:
                    b_g = _load_one(p_grad_s, j, J, D, DP)
            for at in range(begin, end, C):
                i = at + tl.arange(0, C)
                b_u_hat = _load(p_u_hat, (b * I + i) * (J * D), i < end, j, J, D, DP)
                if UNIFORM:
                    b_sum += b_u_hat
                else:
                    logits = _logits(b_u_hat, b_v, j, J)
                    c = softmax(logits, LEAKY)
                    if GRADIENT:
                        a = tl.sum(b_u_hat * b_g, 2)
                        c = c * (a - tl.sum(c * a, 1)[:, None])
                    b_sum += c[:, :, None] * b_u_hat
            mask = (j < J)[:, None] & (d < D)[None, :]
            tl.store(p_sum + (j * D)[:, None] + d[None, :], tl.sum(b_sum, 0), mask=mask)
    else:
        for at in range(begin, end, C):
            i = at + tl.arange(0, C)
            row = (b * I + i) * (J * D)
            m_row = i < end
            top, factor, mean = _statistics(
                p_u_hat, p_total, p_grad_s, row, m_row, C, J, D, JB, DP, LEAKY, GRADIENT
            )
            for first in range(0, J, JB):
                j = first + tl.arange(0, JB)
                b_u_hat = _load(p_u_hat, row, m_row, j, J, D, DP)
                logits = _logits(b_u_hat, _load_one(p_total, j, J, D, DP), j, J)
                c = power(logits - top[:, None]) * factor[:, None]
                if GRADIENT:
                    a = tl.sum(b_u_hat * _load_one(p_grad_s, j, J, D, DP), 2)
                    c = c * (a - mean[:, None])
                mask = (j < J)[:, None] & (d < D)[None, :]
                p_jd = p_sum + (j * D)[:, None] + d[None, :]
                b_sum = tl.sum(c[:, :, None] * b_u_hat, 0) + load_if(at > begin, p_jd, mask)
                tl.store(p_jd, b_sum, mask=mask)
            tl.debug_barrier()


@triton.jit(do_not_specialize=["B", "I", "parts", "passes"])
def precomputed_gradient_kernel(
    p_u_hat, p_total, p_grad_s, p_grad, B, I, parts, passes, factor,
    J: tl.constexpr, D: tl.constexpr, C: tl.constexpr, JB: tl.constexpr, DP: tl.constexpr,
    ROUTED: tl.constexpr, LEAKY: tl.constexpr, DETACH: tl.constexpr,
):  # fmt: skip
    """∂û of C input capsules of one sample; with DETACH c ∂s of the last pass."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // parts
    i = (pid % parts) * C + tl.arange(0, C)
    row = (b * I + i) * (J * D)
    m_row = i < I
    d = tl.arange(0, DP)
    layer = B.to(tl.int64) * (J * D)
    p_total = p_total + b * (J * D)
    p_grad_s = p_grad_s + b * (J * D)
    for first in range(0, J, JB):
        j = first + tl.arange(0, JB)
        b_grad = tl.zeros([C, JB, DP], tl.float32)
        if not ROUTED or not DETACH:
            b_grad += factor * _load_one(p_grad_s, j, J, D, DP)
        if ROUTED:
            b_u_hat = _load(p_u_hat, row, m_row, j, J, D, DP)
            begin = 1
            if DETACH:
                begin = passes - 1
            for t in range(begin, passes):
                p_v = p_total + (t - 1) * layer
                p_s = p_grad_s + t * layer
                b_v = _load_one(p_v, j, J, D, DP)
                b_s = _load_one(p_s, j, J, D, DP)
                logits = _logits(b_u_hat, b_v, j, J)
                if J <= JB:
                    c = softmax(logits, LEAKY)
                    a = tl.sum(b_u_hat * b_s, 2)
                    mean = tl.sum(c * a, 1)
                else:
                    top, norm, mean = _statistics(
                        p_u_hat, p_v, p_s, row, m_row, C, J, D, JB, DP, LEAKY, not DETACH
                    )
                    c = power(logits - top[:, None]) * norm[:, None]
                    a = tl.sum(b_u_hat * b_s, 2)
                b_grad += c[:, :, None] * b_s
                if not DETACH:
                    b_grad += (c * (a - mean[:, None]))[:, :, None] * b_v
        mask = m_row[:, None, None] & (j < J)[None, :, None] & (d < D)[None, None, :]
        p = p_grad + row[:, None, None] + (j * D)[None, :, None] + d[None, None, :]
        tl.store(p, b_grad.to(p_grad.dtype.element_ty), mask=mask)


class PrecomputedRouting:
    """The shapes of one call, and the launches of its passes."""

    def __init__(self, u_hat: Tensor, leaky: bool) -> None:
        self.u_hat, self.leaky = u_hat, leaky
        self.B, self.I, self.J, self.D = u_hat.shape
        self.tile = launch_configs.precomputed(self.I, self.J, self.D)
        self.options = {"J": self.J, "D": self.D, **self.tile.options(), "LEAKY": leaky}

    def sums_of_pass(self, parts: int) -> Tensor:
        return self.u_hat.new_empty(parts, self.B, self.J, self.D, dtype=torch.float32)

    def one_pass(self, total: Tensor | None, grad_s: Tensor | None) -> Tensor:
        """Sums over parts of i [parts, B, J, D]: of û; with V of c û; with V and ∂s of ∂b û."""
        parts = launch_configs.split(self.I, self.B, self.u_hat, self.tile.inputs)
        partials = self.sums_of_pass(parts.number)
        launch(
            precomputed_pass_kernel, self.B * parts.number, self.u_hat, partials if total is None else total,
            partials if grad_s is None else grad_s, partials, self.B, self.I, parts.number, parts.size,
            UNIFORM=total is None, GRADIENT=grad_s is not None, **self.options,
        )  # fmt: skip
        return partials

    def forward(
        self, bias: Tensor | None, iterations: int, passes: int, squash_output: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """v, s of the first `passes` passes of `iterations`, and V; v is set by the last pass of all."""
        s = self.sums_of_pass(passes)
        v, total = self.u_hat.new_empty(s.shape[1:]), s.new_empty(s.shape[1:])
        last = max(iterations, 1) - 1
        for t in range(passes):
            partials = self.one_pass(None if t == 0 else total, None)
            count = self.J + self.leaky if t == 0 and iterations else 1
            reductions.finish_pass(partials, bias, s[t], total, v, count, t == 0, t == last, squash_output)
        return v, s, total


def dynamic_routing(
    u_hat: Tensor,
    bias: Tensor | None,
    logits: None,
    mask: None,
    iterations: int,
    leaky: bool,
    squash_output: bool,
) -> tuple[Tensor, Tensor]:
    with on_device(u_hat):
        v, s, _ = PrecomputedRouting(u_hat, leaky).forward(
            bias, iterations, max(iterations, 1), squash_output
        )
    return v, s


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
    with on_device(u_hat):
        routing = PrecomputedRouting(u_hat, leaky)
        total, grad_s = reductions.prepare_backward(grad, s, squash_output)
        last = len(s) - 1
        if not detach:
            reductions.reduce_backward(lambda v, grad, _: routing.one_pass(v, grad), total, grad_s, s)
        grad_u_hat = torch.empty_like(u_hat)
        parts = ceil_div(routing.I, routing.tile.inputs)
        factor = 1 / (routing.J + leaky) if iterations else 1.0
        launch(
            precomputed_gradient_kernel, routing.B * parts, u_hat, total, grad_s, grad_u_hat, routing.B,
            routing.I, parts, len(s), factor, ROUTED=last > 0, DETACH=detach, **routing.options,
        )  # fmt: skip
        grad_bias = reductions.bias_gradient(grad_s[last if detach else 0 :], u_hat)
    return grad_u_hat, grad_bias, u_hat.new_empty(0)
