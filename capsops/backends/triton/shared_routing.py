"""Routing with a weight that all input capsules share, W [J, D, K], among the input capsules themselves.

With û_ij = W_j u_i: û · V = u · P with P = Wᵀ V, and Σ_i c û = W z with z = Σ_i c u. So a pass reads u
[B, I, K] and has J vectors of length K of each sample on either side; the products with W between two passes
are small.

Forward, for t = 1…T: cᵗ = softmax_j(ℓ + u · Pᵗ⁻¹), zᵗ = Σ_i cᵗ u, sᵗ = W zᵗ + β, Vᵗ = Vᵗ⁻¹ + squash(sᵗ).
Backward, with Q = Wᵀ ∂s: for t = T…2, a = u · Q, ∂b = c (a − Σ_j c a), y = Σ_i ∂b u, ∂Vᵗ⁻¹ = ∂Vᵗ + W y; then
∂u = Σ_t Σ_j (cᵗ Qᵗ + ∂bᵗ Pᵗ⁻¹) and ∂W = Σ_t Σ_b (∂sᵗ zᵗᵀ + Vᵗ⁻¹ yᵗᵀ).

û [B, I, D] that is the same for all output capsules is the same thing with W_j = 1 and K = D.

The products of a block are those of attention: u and P make logits [C, JB], the couplings and u make z
[JB, KB], which stays in registers where one block has all j and k.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from capsops.backends.triton import launch_configs, reductions
from capsops.backends.triton.capsules import load_if, power, present, product
from capsops.backends.triton.launch import launch, unit
from capsops.backends.triton.launch_configs import ceil_div
from capsops.backends.triton.pairs import LogitsGradient, add_pairs, load_pairs, mask_bytes, pairs
from capsops.backends.triton.predictions import predictions, predictions_backward
from capsops.backends.triton.softmax import finite_or_0, open_pairs, softmax


@triton.jit
def _load_block(p_x, row, m_row, k, K: tl.constexpr):
    """Components k of vectors that begin at `row`: [rows, KB]."""
    return tl.load(p_x + row[:, None] + k[None, :], mask=m_row[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def _agreements(
    p_u, p_x, row, m_row, j, J: tl.constexpr, K: tl.constexpr, C: tl.constexpr, JB: tl.constexpr,
    KB: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """u · x [C, JB] for x [J, K] of one sample."""
    b_a = tl.zeros([C, JB], tl.float32)
    for first in range(0, K, KB):
        k = first + tl.arange(0, KB)
        b_u = _load_block(p_u, row, m_row, k, K)
        b_a += product(b_u, tl.trans(_load_block(p_x, j * K, j < J, k, K)), UNIT)
    return b_a


@triton.jit
def _logits(
    p_u, p_p, starting, b, i, m_i, row, m_row, j, J: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    JB: tl.constexpr, KB: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """ℓ + u · P [C, JB], −∞ beyond the last j; without P ℓ, without ℓ u · P."""
    logits = tl.zeros([C, JB], tl.float32)
    if p_p is not None:
        logits = _agreements(p_u, p_p, row, m_row, j, J, K, C, JB, KB, UNIT)
    if starting is not None:
        logits += load_pairs(starting, b, None, i[:, None], m_i[:, None], j[None, :], (j < J)[None, :])
    return tl.where((j < J)[None, :], logits, -float("inf"))


@triton.jit
def _statistics(
    p_u, p_p, p_q, starting, b, i, m_i, row, m_row, J: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    JB: tl.constexpr, KB: tl.constexpr, LEAKY: tl.constexpr, GRADIENT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Of each i: the largest logit, 1 / Σ_j exp(b − largest) and, with GRADIENT, Σ_j c a; all [C].

    Only where one block does not have all j; else they are not used.
    """
    top = tl.full([C], -float("inf"), tl.float32)
    z = tl.zeros([C], tl.float32)
    mean = tl.zeros([C], tl.float32)
    if LEAKY:
        top = tl.zeros([C], tl.float32)
        z = tl.full([C], 1.0, tl.float32)
    if J > JB:
        for first in range(0, J, JB):
            j = first + tl.arange(0, JB)
            logits = _logits(p_u, p_p, starting, b, i, m_i, row, m_row, j, J, K, C, JB, KB, UNIT)
            higher = tl.maximum(top, tl.max(logits, 1))
            base = finite_or_0(higher)
            shrink = tl.exp(top - base)
            e = power(logits - base[:, None])
            z = z * shrink + tl.sum(e, 1)
            if GRADIENT:
                a = _agreements(p_u, p_q, row, m_row, j, J, K, C, JB, KB, UNIT)
                mean = mean * shrink + tl.sum(e * a, 1)
            top = higher
    z = tl.where(z == 0, 1.0, z)
    return finite_or_0(top), 1.0 / z, mean / z


@triton.jit
def _couplings(
    p_u, p_p, p_q, starting, b, i, m_i, row, m_row, j, top, norm, mean, J: tl.constexpr, K: tl.constexpr,
    C: tl.constexpr, JB: tl.constexpr, KB: tl.constexpr, LEAKY: tl.constexpr, GRADIENT: tl.constexpr,
    UNIFORM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """c and, with GRADIENT, ∂b [C, JB] of a block of j. UNIFORM: c of every open pair is 1."""
    logits = _logits(p_u, p_p, starting, b, i, m_i, row, m_row, j, J, K, C, JB, KB, UNIT)
    if UNIFORM:
        c = open_pairs(logits)
    elif J <= JB:
        c = softmax(logits, LEAKY, True)
    else:
        c = power(logits - top[:, None]) * norm[:, None]
    grad_b = c
    if GRADIENT:
        a = _agreements(p_u, p_q, row, m_row, j, J, K, C, JB, KB, UNIT)
        if J <= JB:
            mean = tl.sum(c * a, 1)
        grad_b = c * (a - mean[:, None])
    return c, grad_b


@triton.jit(do_not_specialize=["B", "I", "parts", "size"])
def shared_pass_kernel(
    p_u, p_mask, p_p, p_q, starting, p_z, p_y, B, I, parts, size,
    J: tl.constexpr, K: tl.constexpr, C: tl.constexpr, JB: tl.constexpr, KB: tl.constexpr,
    LEAKY: tl.constexpr, UNIFORM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """z = Σ_i c u and y = Σ_i ∂b u of one sample over `size` input capsules, each where it is not None.

    Without P, which is 0 in the first pass, the logits are ℓ; without both UNIFORM has to be true.
    """
    GRADIENT: tl.constexpr = p_y is not None
    pid = tl.program_id(0).to(tl.int64)
    b = pid // parts
    part = pid % parts
    begin = part * size
    end = tl.minimum(begin + size, I)
    sample = b * (J * K)
    out = (part * B + b) * (J * K)
    if p_p is not None:
        p_p += sample
    if p_q is not None:
        p_q += sample
    if p_z is not None:
        p_z += out
    if p_y is not None:
        p_y += out
    if J <= JB and K <= KB:
        j = tl.arange(0, JB)
        k = tl.arange(0, KB)
        b_z = tl.zeros([JB, KB], tl.float32)
        b_y = tl.zeros([JB, KB], tl.float32)
        for at in range(begin, end, C):
            i = at + tl.arange(0, C)
            m_row = present(p_mask, b, i, i < end, I)
            row = (b * I + i) * K
            c, grad_b = _couplings(
                p_u, p_p, p_q, starting, b, i, i < end, row, m_row, j, None, None, None, J, K, C, JB, KB,
                LEAKY, GRADIENT, UNIFORM, UNIT,
            )  # fmt: skip
            b_u = _load_block(p_u, row, m_row, k, K)
            if p_z is not None:
                b_z += product(tl.trans(c), b_u, UNIT)
            if p_y is not None:
                b_y += product(tl.trans(grad_b), b_u, UNIT)
        p = (j * K)[:, None] + k[None, :]
        m_jk = (j < J)[:, None] & (k < K)[None, :]
        if p_z is not None:
            tl.store(p_z + p, b_z, mask=m_jk)
        if p_y is not None:
            tl.store(p_y + p, b_y, mask=m_jk)
    else:
        for at in range(begin, end, C):
            i = at + tl.arange(0, C)
            m_row = present(p_mask, b, i, i < end, I)
            row = (b * I + i) * K
            top, norm, mean = _statistics(
                p_u, p_p, p_q, starting, b, i, i < end, row, m_row, J, K, C, JB, KB, LEAKY, GRADIENT, UNIT
            )
            for first in range(0, J, JB):
                j = first + tl.arange(0, JB)
                c, grad_b = _couplings(
                    p_u, p_p, p_q, starting, b, i, i < end, row, m_row, j, top, norm, mean, J, K, C, JB, KB,
                    LEAKY, GRADIENT, UNIFORM, UNIT,
                )  # fmt: skip
                for k_first in range(0, K, KB):
                    k = k_first + tl.arange(0, KB)
                    b_u = _load_block(p_u, row, m_row, k, K)
                    p = (j * K)[:, None] + k[None, :]
                    m_jk = (j < J)[:, None] & (k < K)[None, :]
                    if p_z is not None:
                        b_z = product(tl.trans(c), b_u, UNIT) + load_if(at > begin, p_z + p, m_jk)
                        tl.store(p_z + p, b_z, mask=m_jk)
                    if p_y is not None:
                        b_y = product(tl.trans(grad_b), b_u, UNIT) + load_if(at > begin, p_y + p, m_jk)
                        tl.store(p_y + p, b_y, mask=m_jk)
            tl.debug_barrier()


@triton.jit
def _add_terms(
    b_grad, p_u, p_p, p_q, starting, b, i, m_i, row, m_row, k, J: tl.constexpr, K: tl.constexpr,
    C: tl.constexpr, JB: tl.constexpr, KB: tl.constexpr, LEAKY: tl.constexpr, GRADIENT: tl.constexpr,
    UNIFORM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """b_grad + Σ_j (c Q + ∂b P) of one pass; without GRADIENT of c Q only."""
    top, norm, mean = _statistics(
        p_u, p_p, p_q, starting, b, i, m_i, row, m_row, J, K, C, JB, KB, LEAKY, GRADIENT, UNIT
    )
    for first in range(0, J, JB):
        j = first + tl.arange(0, JB)
        c, grad_b = _couplings(
            p_u, p_p, p_q, starting, b, i, m_i, row, m_row, j, top, norm, mean, J, K, C, JB, KB, LEAKY,
            GRADIENT, UNIFORM, UNIT,
        )  # fmt: skip
        b_grad += product(c, _load_block(p_q, j * K, j < J, k, K), UNIT)
        if GRADIENT:
            b_grad += product(grad_b, _load_block(p_p, j * K, j < J, k, K), UNIT)
    return b_grad


@triton.jit(do_not_specialize=["B", "I", "blocks", "passes"])
def shared_gradient_kernel(
    p_u, p_mask, p_p, p_q, starting, p_grad, B, I, blocks, passes, factor,
    J: tl.constexpr, K: tl.constexpr, C: tl.constexpr, JB: tl.constexpr, KB: tl.constexpr,
    LEAKY: tl.constexpr, DETACH: tl.constexpr, UNIFORM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """KB components of ∂u of C input capsules of one sample; with DETACH of the last pass, not the first.

    c of the first pass is `factor`; with starting logits it is their softmax or, UNIFORM, 1 for every open
    pair. Where K > KB each program makes the logits of all components.
    """
    pid = tl.program_id(0).to(tl.int64)
    depths = tl.cdiv(K, KB)
    k = (pid % depths).to(tl.int32) * KB + tl.arange(0, KB)
    b = pid // depths // blocks
    i = (pid // depths % blocks) * C + tl.arange(0, C)
    m_row = present(p_mask, b, i, i < I, I)
    row = (b * I + i) * K
    layer = B.to(tl.int64) * (J * K)
    p_p += b * (J * K)
    p_q += b * (J * K)
    b_grad = tl.zeros([C, KB], tl.float32)
    first_pass = 1
    if DETACH:
        first_pass = passes - 1
    elif starting is None:
        b_sum = tl.zeros([KB], tl.float32)
        for first in range(0, J, JB):
            j = first + tl.arange(0, JB)
            b_sum += tl.sum(_load_block(p_q, j * K, j < J, k, K), 0)
        b_grad += factor * b_sum[None, :]
    else:
        b_grad = _add_terms(
            b_grad, p_u, None, p_q, starting, b, i, i < I, row, m_row, k, J, K, C, JB, KB, LEAKY, False,
            UNIFORM, UNIT,
        )  # fmt: skip
    for t in range(first_pass, passes):
        b_grad = _add_terms(
            b_grad, p_u, p_p + (t - 1) * layer, p_q + t * layer, starting, b, i, i < I, row, m_row, k, J, K,
            C, JB, KB, LEAKY, not DETACH, False, UNIT,
        )  # fmt: skip
    if p_mask is not None:
        b_grad = tl.where(m_row[:, None], b_grad, 0.0)
    p = p_grad + row[:, None] + k[None, :]
    tl.store(p, b_grad.to(p_grad.dtype.element_ty), mask=(i < I)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["B", "I", "parts", "samples", "size", "passes"])
def shared_logits_kernel(
    p_u, p_mask, p_p, p_q, starting, grad_logits, B, I, parts, samples, size, passes,
    J: tl.constexpr, K: tl.constexpr, C: tl.constexpr, JB: tl.constexpr, KB: tl.constexpr,
    LEAKY: tl.constexpr, DETACH: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """∂ℓ = Σ_t ∂bᵗ of `samples` samples and `size` input capsules; with DETACH ∂b of the last pass."""
    pid = tl.program_id(0).to(tl.int64)
    tile = pid // parts
    part = pid % parts
    begin = part * size
    end = tl.minimum(begin + size, I)
    layer = B.to(tl.int64) * (J * K)
    for b in range(tile * samples, tl.minimum((tile + 1) * samples, B)):
        for at in range(begin, end, C):
            i = at + tl.arange(0, C)
            m_i = i < end
            m_row = present(p_mask, b, i, m_i, I)
            row = (b * I + i) * K
            first_pass = 0
            if DETACH:
                first_pass = passes - 1
            for t in range(first_pass, passes):
                # P of the first pass is 0.
                p_p_t = p_p + t * layer + b * (J * K)
                p_q_t = p_q + t * layer + b * (J * K)
                top, norm, mean = _statistics(
                    p_u, p_p_t, p_q_t, starting, b, i, m_i, row, m_row, J, K, C, JB, KB, LEAKY, True, UNIT
                )
                for first in range(0, J, JB):
                    j = first + tl.arange(0, JB)
                    _, grad_b = _couplings(
                        p_u, p_p_t, p_q_t, starting, b, i, m_i, row, m_row, j, top, norm, mean, J, K, C, JB,
                        KB, LEAKY, True, False, UNIT,
                    )  # fmt: skip
                    grad_b = tl.where(m_i[:, None] & (j < J)[None, :], grad_b, 0.0)
                    add_pairs(
                        grad_logits, tile, part, grad_b, b, None, i[:, None], m_i[:, None], j[None, :],
                        (j < J)[None, :],
                    )  # fmt: skip
                    tl.debug_barrier()


@triton.jit(do_not_specialize=["B", "I", "blocks"])
def shared_couplings_kernel(
    p_u, p_mask, p_p, starting, p_c, B, I, blocks,
    J: tl.constexpr, K: tl.constexpr, C: tl.constexpr, JB: tl.constexpr, KB: tl.constexpr,
    LEAKY: tl.constexpr, UNIFORM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """c [B, I, J] of C input capsules of one sample."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // blocks
    i = (pid % blocks) * C + tl.arange(0, C)
    m_row = present(p_mask, b, i, i < I, I)
    row = (b * I + i) * K
    if p_p is not None:
        p_p += b * (J * K)
    top, norm, mean = _statistics(
        p_u, p_p, None, starting, b, i, i < I, row, m_row, J, K, C, JB, KB, LEAKY, False, UNIT
    )
    for first in range(0, J, JB):
        j = first + tl.arange(0, JB)
        c, _ = _couplings(
            p_u, p_p, None, starting, b, i, i < I, row, m_row, j, top, norm, mean, J, K, C, JB, KB, LEAKY,
            False, UNIFORM, UNIT,
        )  # fmt: skip
        if p_mask is not None:
            c = tl.where(m_row[:, None], c, 0.0)
        p = p_c + ((b * I + i) * J)[:, None] + j[None, :]
        tl.store(p, c.to(p_c.dtype.element_ty), mask=(i < I)[:, None] & (j < J)[None, :])


class SharedRouting:
    """The shapes of one call, and the launches of its passes. Without a weight every W_j is 1."""

    def __init__(
        self, u: Tensor, weight: Tensor | None, out_capsules: int, logits: Tensor | None,
        mask: Tensor | None, iterations: int, leaky: bool,
    ) -> None:  # fmt: skip
        self.u, self.weight, self.logits, self.iterations, self.leaky = u, weight, logits, iterations, leaky
        self.starting, self.mask = pairs(logits), mask_bytes(mask)
        self.B, self.I, self.K = u.shape
        self.J = out_capsules
        self.D = self.K if weight is None else weight.shape[1]
        self.W = None if weight is None else weight.unsqueeze(1)  # of J capsules with one output each
        self.tile = launch_configs.shared(self.I, self.J, self.K)
        self.options = {"J": self.J, "K": self.K, "LEAKY": leaky, "UNIT": unit(u), **self.tile.options()}

    def numbers(self, *sizes: int) -> Tensor:
        return self.u.new_empty(sizes, dtype=torch.float32)

    def projected(self, x: Tensor) -> Tensor:
        """Wᵀ x [B′, J, K] for x [B′, J, D]."""
        if self.W is None:
            return x
        like = self.numbers(len(x), self.J, self.K)
        return predictions_backward(x.unsqueeze(2), like, self.W, True, False)[0]

    def applied(self, z: Tensor) -> Tensor:
        """W z [B, J, D] for z [B, J, K]."""
        return z if self.W is None else predictions(z, self.W).squeeze(2)

    def parts(self) -> launch_configs.Split:
        """Parts of i of a pass."""
        return launch_configs.split(self.I, self.B, self.u, self.tile.resident, self.tile.inputs)

    def sums_of_pass(self, out_capsules: int) -> Tensor:
        """Memory for partial sums over i [parts, B, J, K]."""
        return self.numbers(self.parts().number, self.B, out_capsules, self.K)

    def one_pass(
        self, p: Tensor | None, q: Tensor | None, z: Tensor | None, y: Tensor | None, J: int
    ) -> None:
        """Fills the partial sums of c u and of ∂b u, from P and Q."""
        parts = self.parts()
        launch(
            shared_pass_kernel, self.B * parts.number, self.u, self.mask, p, q, self.starting, z, y, self.B,
            self.I, parts.number, parts.size,
            UNIFORM=p is None and (self.starting is None or not self.iterations), **{**self.options, "J": J},
        )  # fmt: skip

    def weighted_sums(self, p: Tensor | None) -> Tensor:
        """Partial sums of z [parts, B, J, K] of a pass. Without P and ℓ couplings are 1, and z is Σ_i u."""
        uniform = p is None and self.starting is None
        z = self.sums_of_pass(1 if uniform else self.J)
        self.one_pass(p, None, z, None, z.shape[2])
        return z.expand(-1, -1, self.J, -1).contiguous() if uniform else z

    @property
    def first_factor(self) -> float:
        """What z of the first pass is multiplied by, without starting logits."""
        return 1 / (self.J + self.leaky) if self.iterations else 1.0

    def forward(
        self, bias: Tensor | None, passes: int, squash_output: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """v, s of the first `passes` passes, and V; v is set by the last pass of all."""
        s = self.numbers(passes, self.B, self.J, self.D)
        v, total = self.u.new_empty(s.shape[1:]), s.new_empty(s.shape[1:])
        last = max(self.iterations, 1) - 1
        for t in range(passes):
            sums = self.weighted_sums(self.projected(total) if t else None)
            if self.W is not None:
                sums = self.applied(reductions.added(sums)).unsqueeze(0)
            uniform = t == 0 and self.starting is None and self.iterations
            count = self.J + self.leaky if uniform else 1
            reductions.finish_pass(sums, bias, s[t], total, v, count, t, last, squash_output)
        return v, s, total

    def backward(
        self, grad: Tensor, s: Tensor, detach: bool, squash_output: bool, needs_u: bool, needs_weight: bool,
        needs_logits: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """∂u, ∂W, ∂β and ∂logits."""
        backward = reductions.Backward(grad, s, squash_output)
        total, grad_s = backward.total, backward.grad_s
        passes, last = len(s), len(s) - 1
        detach = detach and last > 0
        shape = (passes, self.B, self.J, self.K)
        p = self.numbers(last, *shape[1:])
        if last:
            p = self.projected(total[:last].flatten(0, 1)).view(p.shape)
        sums: list[tuple[Tensor, Tensor]] = []  # x and z of the terms x zᵀ of ∂W

        def reduced(v: Tensor, grad: Tensor, t: int) -> Tensor:
            z = self.sums_of_pass(self.J) if needs_weight else None
            y = self.sums_of_pass(self.J)
            self.one_pass(p[t], self.projected(grad), z, y, self.J)
            if z is not None:
                sums.extend([(grad, reductions.added(z)), (v, reductions.added(y))])
            return y if self.W is None else self.applied(reductions.added(y)).unsqueeze(0)

        if not detach:
            backward.reduce(reduced)
        grad_u, grad_weight, grad_logits = (self.u.new_empty(0) for _ in range(3))
        if needs_u or needs_logits:
            q = self.projected(grad_s.flatten(0, 1)).view(shape)
        if needs_u:
            grad_u = torch.empty_like(self.u)
            blocks = ceil_div(self.I, self.tile.inputs)
            launch(
                shared_gradient_kernel, self.B * blocks * ceil_div(self.K, self.tile.depth), self.u,
                self.mask, p, q, self.starting, grad_u, self.B, self.I, blocks, passes, self.first_factor,
                DETACH=detach, UNIFORM=self.starting is not None and not self.iterations, **self.options,
            )  # fmt: skip
        if needs_weight and self.W is not None:
            t = last if detach else 0
            z = reductions.added(self.weighted_sums(p[t - 1] if t else None))
            if t == 0 and self.starting is None:
                z = z * self.first_factor
            sums.append((grad_s[t], z))
            grad_weight = predictions_backward(
                torch.cat([x for x, _ in sums]).unsqueeze(2),
                torch.cat([z for _, z in sums]),
                self.W,
                False,
                True,
            )[1].squeeze(1)
        if needs_logits and self.logits is not None:
            grad_logits = self.logits_gradient(self.logits, p, q, detach)
        grad_bias = reductions.bias_gradient(grad_s[last if detach else 0 :], self.u)
        return grad_u, grad_weight, grad_bias, grad_logits

    def logits_gradient(self, logits: Tensor, p: Tensor, q: Tensor, detach: bool) -> Tensor:
        """∂logits, from P and Q of all passes."""
        tiles, parts = launch_configs.pair_blocks(logits, self.B, self.I, self.tile.inputs)
        gradient = LogitsGradient(logits, tiles.number, parts.number)
        if self.iterations:
            launch(
                shared_logits_kernel, tiles.number * parts.number, self.u, self.mask,
                torch.cat([torch.zeros_like(q[:1]), p]), q, self.starting, gradient.arguments(),
                self.B, self.I, parts.number, tiles.size, parts.size, len(q), DETACH=detach, **self.options,
            )  # fmt: skip
        return gradient.result()

    def couplings(self, bias: Tensor | None) -> Tensor:
        c = self.u.new_empty(self.B, self.I, self.J)
        p = None
        if self.iterations > 1:
            p = self.projected(self.forward(bias, self.iterations - 1)[2])
        blocks = ceil_div(self.I, self.tile.inputs)
        launch(
            shared_couplings_kernel, self.B * blocks, self.u, self.mask, p, self.starting, c, self.B, self.I,
            blocks, UNIFORM=not self.iterations, **self.options,
        )  # fmt: skip
        return c
