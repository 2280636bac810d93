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

from capsops import reference
from capsops.backends.triton import launch_configs, reductions
from capsops.backends.triton.capsules import load_if, power, present
from capsops.backends.triton.launch import launch, on_device
from capsops.backends.triton.launch_configs import ceil_div
from capsops.backends.triton.pairs import LogitsGradient, add_pairs, load_pairs, mask_bytes, pairs
from capsops.backends.triton.shared_routing import SharedRouting
from capsops.backends.triton.softmax import finite_or_0, open_pairs, softmax


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
def _logits(b_u_hat, b_v, starting, b, i, m_i, j, J: tl.constexpr):
    """ℓ + û · V [C, JB], −∞ beyond the last j; without V ℓ, without ℓ û · V."""
    if b_v is None:
        logits = tl.zeros([b_u_hat.shape[0], b_u_hat.shape[1]], tl.float32)
    else:
        logits = tl.sum(b_u_hat * b_v, 2)
    if starting is not None:
        logits += load_pairs(starting, b, None, i[:, None], m_i[:, None], j[None, :], (j < J)[None, :])
    return tl.where((j < J)[None, :], logits, -float("inf"))


@triton.jit
def _statistics(
    p_u_hat, p_v, p_grad_s, starting, b, i, m_i, row, m_row, C: tl.constexpr, J: tl.constexpr,
    D: tl.constexpr, JB: tl.constexpr, DP: tl.constexpr, LEAKY: tl.constexpr, GRADIENT: tl.constexpr,
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
        b_v = None if p_v is None else _load_one(p_v, j, J, D, DP)
        logits = _logits(b_u_hat, b_v, starting, b, i, m_i, j, J)
        higher = tl.maximum(top, tl.max(logits, 1))
        base = higher
        if starting is not None:
            base = finite_or_0(higher)
        shrink = tl.exp(top - base)
        e = power(logits - base[:, None])
        z = z * shrink + tl.sum(e, 1)
        if GRADIENT:
            a = tl.sum(b_u_hat * _load_one(p_grad_s, j, J, D, DP), 2)
            mean = mean * shrink + tl.sum(e * a, 1)
        top = higher
    if starting is not None:
        top = finite_or_0(top)
        z = tl.where(z == 0, 1.0, z)
    return top, 1.0 / z, mean / z


@triton.jit
def _first_couplings(
    p_u_hat, starting, b, i, m_i, row, m_row, j, C: tl.constexpr, J: tl.constexpr, D: tl.constexpr,
    JB: tl.constexpr, DP: tl.constexpr, LEAKY: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """c of starting logits without û · V [C, JB]; UNIFORM: 1 for every open pair."""
    logits = _logits(tl.zeros([C, JB, 1], tl.float32), None, starting, b, i, m_i, j, J)
    if UNIFORM:
        c = open_pairs(logits)
    elif J <= JB:
        c = softmax(logits, LEAKY, True)
    else:
        top, norm, _ = _statistics(
            p_u_hat, None, None, starting, b, i, m_i, row, m_row, C, J, D, JB, DP, LEAKY, False
        )
        c = power(logits - top[:, None]) * norm[:, None]
    return c


@triton.jit
def _gradient_of_logits(
    p_u_hat, p_v, p_grad_s, starting, b, i, m_i, row, m_row, j, b_u_hat, C: tl.constexpr, J: tl.constexpr,
    D: tl.constexpr, JB: tl.constexpr, DP: tl.constexpr, LEAKY: tl.constexpr,
):  # fmt: skip
    """∂b = c (a − Σ_j c a) of one pass [C, JB]."""
    b_v = None if p_v is None else _load_one(p_v, j, J, D, DP)
    logits = _logits(b_u_hat, b_v, starting, b, i, m_i, j, J)
    a = tl.sum(b_u_hat * _load_one(p_grad_s, j, J, D, DP), 2)
    if J <= JB:
        c = softmax(logits, LEAKY, True)
        mean = tl.sum(c * a, 1)
    else:
        top, norm, mean = _statistics(
            p_u_hat, p_v, p_grad_s, starting, b, i, m_i, row, m_row, C, J, D, JB, DP, LEAKY, True
        )
        c = power(logits - top[:, None]) * norm[:, None]
    return c * (a - mean[:, None])


@triton.jit(do_not_specialize=["B", "I", "parts", "size"])
def precomputed_pass_kernel(
    p_u_hat, p_mask, p_total, p_grad_s, starting, p_partials, B, I, parts, size,
    J: tl.constexpr, D: tl.constexpr, C: tl.constexpr, JB: tl.constexpr, DP: tl.constexpr,
    UNIFORM: tl.constexpr, LEAKY: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Σ_i û (UNIFORM), Σ_i c û or, with GRADIENT, Σ_i ∂b û, over `size` input capsules of one sample.

    Closed pairs have no part in the sum. The first pass has no V but starting logits.
    """
    pid = tl.program_id(0).to(tl.int64)
    b = pid // parts
    part = pid % parts
    if p_total is not None:
        p_total = p_total + b * (J * D)
    if p_grad_s is not None:
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
                b_v = None if p_total is None else _load_one(p_total, j, J, D, DP)
                if GRADIENT:
                    b_g = _load_one(p_grad_s, j, J, D, DP)
            for at in range(begin, end, C):
                i = at + tl.arange(0, C)
                row = (b * I + i) * (J * D)
                m_i = i < end
                m_row = present(p_mask, b, i, m_i, I)
                b_u_hat = _load(p_u_hat, row, m_row, j, J, D, DP)
                if UNIFORM:
                    if starting is not None:
                        c = open_pairs(_logits(b_u_hat, None, starting, b, i, m_i, j, J))
                        b_u_hat = c[:, :, None] * b_u_hat
                    b_sum += b_u_hat
                else:
                    logits = _logits(b_u_hat, b_v, starting, b, i, m_i, j, J)
                    c = softmax(logits, LEAKY, starting is not None)
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
            m_i = i < end
            m_row = present(p_mask, b, i, m_i, I)
            top, factor, mean = _statistics(
                p_u_hat, p_total, p_grad_s, starting, b, i, m_i, row, m_row, C, J, D, JB, DP, LEAKY,
                GRADIENT,
            )  # fmt: skip
            for first in range(0, J, JB):
                j = first + tl.arange(0, JB)
                b_u_hat = _load(p_u_hat, row, m_row, j, J, D, DP)
                b_v = None if p_total is None else _load_one(p_total, j, J, D, DP)
                logits = _logits(b_u_hat, b_v, starting, b, i, m_i, j, J)
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
    p_u_hat, p_mask, p_total, p_grad_s, starting, p_grad, B, I, parts, passes, factor,
    J: tl.constexpr, D: tl.constexpr, C: tl.constexpr, JB: tl.constexpr, DP: tl.constexpr,
    ROUTED: tl.constexpr, LEAKY: tl.constexpr, DETACH: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """∂û of C input capsules of one sample; with DETACH c ∂s of the last pass.

    c of the first pass is `factor`; with starting logits it is their softmax or, UNIFORM, 1 for every open
    pair.
    """
    pid = tl.program_id(0).to(tl.int64)
    b = pid // parts
    i = (pid % parts) * C + tl.arange(0, C)
    row = (b * I + i) * (J * D)
    m_i = i < I
    m_row = present(p_mask, b, i, m_i, I)
    d = tl.arange(0, DP)
    layer = B.to(tl.int64) * (J * D)
    p_total = p_total + b * (J * D)
    p_grad_s = p_grad_s + b * (J * D)
    for first in range(0, J, JB):
        j = first + tl.arange(0, JB)
        b_grad = tl.zeros([C, JB, DP], tl.float32)
        if not ROUTED or not DETACH:
            if starting is None:
                b_grad += factor * _load_one(p_grad_s, j, J, D, DP)
            else:
                c = _first_couplings(
                    p_u_hat, starting, b, i, m_i, row, m_row, j, C, J, D, JB, DP, LEAKY, UNIFORM
                )
                b_grad += c[:, :, None] * _load_one(p_grad_s, j, J, D, DP)
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
                logits = _logits(b_u_hat, b_v, starting, b, i, m_i, j, J)
                if J <= JB:
                    c = softmax(logits, LEAKY, starting is not None)
                    a = tl.sum(b_u_hat * b_s, 2)
                    mean = tl.sum(c * a, 1)
                else:
                    top, norm, mean = _statistics(
                        p_u_hat, p_v, p_s, starting, b, i, m_i, row, m_row, C, J, D, JB, DP, LEAKY,
                        not DETACH,
                    )  # fmt: skip
                    c = power(logits - top[:, None]) * norm[:, None]
                    a = tl.sum(b_u_hat * b_s, 2)
                b_grad += c[:, :, None] * b_s
                if not DETACH:
                    b_grad += (c * (a - mean[:, None]))[:, :, None] * b_v
        if p_mask is not None:
            b_grad = tl.where(m_row[:, None, None], b_grad, 0.0)
        mask = m_i[:, None, None] & (j < J)[None, :, None] & (d < D)[None, None, :]
        p = p_grad + row[:, None, None] + (j * D)[None, :, None] + d[None, None, :]
        tl.store(p, b_grad.to(p_grad.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B", "I", "parts", "samples", "size", "passes"])
def precomputed_logits_kernel(
    p_u_hat, p_mask, p_total, p_grad_s, starting, grad_logits, B, I, parts, samples, size, passes,
    J: tl.constexpr, D: tl.constexpr, C: tl.constexpr, JB: tl.constexpr, DP: tl.constexpr,
    LEAKY: tl.constexpr, DETACH: tl.constexpr,
):  # fmt: skip
    """∂ℓ = Σ_t ∂bᵗ of `samples` samples and `size` input capsules; with DETACH ∂b of the last pass."""
    pid = tl.program_id(0).to(tl.int64)
    tile = pid // parts
    part = pid % parts
    begin = part * size
    end = tl.minimum(begin + size, I)
    layer = B.to(tl.int64) * (J * D)
    for b in range(tile * samples, tl.minimum((tile + 1) * samples, B)):
        for at in range(begin, end, C):
            i = at + tl.arange(0, C)
            m_i = i < end
            m_row = present(p_mask, b, i, m_i, I)
            row = (b * I + i) * (J * D)
            for first in range(0, J, JB):
                j = first + tl.arange(0, JB)
                b_u_hat = _load(p_u_hat, row, m_row, j, J, D, DP)
                p_s = p_grad_s + b * (J * D)
                grad = tl.zeros([C, JB], tl.float32)
                if not DETACH:
                    grad += _gradient_of_logits(
                        p_u_hat, None, p_s, starting, b, i, m_i, row, m_row, j, b_u_hat, C, J, D, JB, DP,
                        LEAKY,
                    )  # fmt: skip
                first_pass = 1
                if DETACH:
                    first_pass = passes - 1
                for t in range(first_pass, passes):
                    grad += _gradient_of_logits(
                        p_u_hat, p_total + (t - 1) * layer + b * (J * D), p_s + t * layer, starting, b, i,
                        m_i, row, m_row, j, b_u_hat, C, J, D, JB, DP, LEAKY,
                    )  # fmt: skip
                grad = tl.where(m_i[:, None] & (j < J)[None, :], grad, 0.0)
                add_pairs(
                    grad_logits, tile, part, grad, b, None, i[:, None], m_i[:, None], j[None, :],
                    (j < J)[None, :],
                )  # fmt: skip
                tl.debug_barrier()


class PrecomputedRouting:
    """The shapes of one call, and the launches of its passes."""

    def __init__(
        self, u_hat: Tensor, logits: Tensor | None, mask: Tensor | None, iterations: int, leaky: bool
    ) -> None:
        self.u_hat, self.iterations, self.leaky = u_hat, iterations, leaky
        self.starting, self.mask = pairs(logits), mask_bytes(mask)
        self.B, self.I, self.J, self.D = u_hat.shape
        self.tile = launch_configs.precomputed(self.I, self.J, self.D)
        self.options = {"J": self.J, "D": self.D, **self.tile.options(), "LEAKY": leaky}

    def sums_of_pass(self, parts: int) -> Tensor:
        return self.u_hat.new_empty(parts, self.B, self.J, self.D, dtype=torch.float32)

    def one_pass(self, total: Tensor | None, grad_s: Tensor | None) -> Tensor:
        """Sums over parts of i [parts, B, J, D]: of û; with V or starting logits of c û; with ∂s of ∂b û."""
        uniform = total is None and (self.starting is None or self.iterations == 0)
        parts = launch_configs.split(self.I, self.B, self.u_hat, self.tile.resident, self.tile.inputs)
        partials = self.sums_of_pass(parts.number)
        launch(
            precomputed_pass_kernel, self.B * parts.number, self.u_hat, self.mask,
            partials if uniform else total, partials if grad_s is None else grad_s, self.starting, partials,
            self.B, self.I, parts.number, parts.size, UNIFORM=uniform, GRADIENT=grad_s is not None,
            **self.options,
        )  # fmt: skip
        return partials

    def forward(self, bias: Tensor | None, squash_output: bool) -> tuple[Tensor, Tensor]:
        """v, and s of all passes."""
        passes = max(self.iterations, 1)
        s = self.sums_of_pass(passes)
        v, total = self.u_hat.new_empty(s.shape[1:]), s.new_empty(s.shape[1:])
        for t in range(passes):
            partials = self.one_pass(None if t == 0 else total, None)
            count = self.J + self.leaky if t == 0 and self.iterations and self.starting is None else 1
            reductions.finish_pass(partials, bias, s[t], total, v, count, t, passes - 1, squash_output)
        return v, s

    def logits_gradient(self, logits: Tensor, total: Tensor, grad_s: Tensor, detach: bool) -> Tensor:
        """∂logits, from Vᵗ and ∂sᵗ of all passes."""
        tiles, parts = launch_configs.pair_blocks(logits, self.B, self.I, self.tile.inputs)
        gradient = LogitsGradient(logits, tiles.number, parts.number)
        if self.iterations:
            launch(
                precomputed_logits_kernel, tiles.number * parts.number, self.u_hat, self.mask, total, grad_s,
                self.starting, gradient.arguments(), self.B, self.I, parts.number, tiles.size, parts.size,
                len(grad_s), DETACH=detach, **self.options, **launch_configs.all_registers(),
            )  # fmt: skip
        return gradient.result()


def dynamic_routing(
    u_hat: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    squash_output: bool,
) -> tuple[Tensor, Tensor]:
    with on_device(u_hat):
        if u_hat.dim() == 3:
            J = reference.out_capsules(u_hat, bias, logits)
            routing = SharedRouting(u_hat, None, J, logits, mask, iterations, leaky)
            return routing.forward(bias, max(iterations, 1), squash_output)[:2]
        return PrecomputedRouting(u_hat, logits, mask, iterations, leaky).forward(bias, squash_output)


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
    with on_device(u_hat):
        if u_hat.dim() == 3:
            shared = SharedRouting(u_hat, None, s.shape[2], logits, mask, iterations, leaky)
            grad_u, _, grad_bias, grad_logits = shared.backward(
                grad, s, detach, squash_output, True, False, needs_logits
            )
            return grad_u, grad_bias, grad_logits
        routing = PrecomputedRouting(u_hat, logits, mask, iterations, leaky)
        backward = reductions.Backward(grad, s, squash_output)
        total, grad_s = backward.total, backward.grad_s
        last = len(s) - 1
        detach = detach and last > 0
        if not detach:
            backward.reduce(lambda v, grad, _: routing.one_pass(v, grad))
        grad_u_hat = torch.empty_like(u_hat)
        parts = ceil_div(routing.I, routing.tile.inputs)
        factor = 1 / (routing.J + leaky) if iterations else 1.0
        launch(
            precomputed_gradient_kernel, routing.B * parts, u_hat, routing.mask, total, grad_s,
            routing.starting, grad_u_hat, routing.B, routing.I, parts, len(s), factor, ROUTED=last > 0,
            DETACH=detach, UNIFORM=logits is not None and not iterations, **routing.options,
        )  # fmt: skip
        grad_bias = reductions.bias_gradient(grad_s[last if detach else 0 :], u_hat)
        grad_logits = u_hat.new_empty(0)
        if needs_logits and logits is not None:
            grad_logits = routing.logits_gradient(logits, total, grad_s, detach)
    return grad_u_hat, grad_bias, grad_logits
