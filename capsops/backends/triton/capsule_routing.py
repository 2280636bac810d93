"""A capsule layer without û: forward and backward passes that recompute what they need of it, block by block.

Forward, for t = 1…T: cᵗ = softmax_j(û · Vᵗ⁻¹), sᵗ = Σ_i cᵗ û + β, Vᵗ = Vᵗ⁻¹ + squash(sᵗ).
Backward: for t = T…2, a = û · ∂sᵗ, ∂b = c (a − Σ_j c a), ∂Vᵗ⁻¹ = ∂Vᵗ + Σ_i ∂b û; then, with
∂û = Σ_t (cᵗ ∂sᵗ + ∂bᵗ Vᵗ⁻¹), ∂u = Σ_j Wᵀ ∂û, ∂W = Σ_b ∂û uᵀ.

û itself is never formed. With P_ij = W_ijᵀ V_j, a product over d, the logit û · V is u · P; Σ_i c û is the
product of (c u) and W over all (i, k) of a block; Wᵀ ∂û is Σ_t (c Q + ∂b P) with Q = Wᵀ ∂s; and ∂W is the
product of ∂s and (c u), plus that of V and (∂b u), over the batch. So every product is one of blocks of a few
input capsules and one output capsule, deep enough for a matrix unit whatever J and K are, and the
element-wise work of a pair (b, i, j) is K numbers, not D. The softmax over j takes a loop over all j of its
own, before c is used.

With T = 3 that is 1 + 2 × 3 products of B · I · J · D · K terms forward and 2 × 5 + 10 backward, against 3
and 5 if û were formed; but the depth of those would be K, which the matrix unit pads to 16, and they would
need û, V and the sums of all j in registers.

A program of a pass has a block of samples and a part of the input capsules; its sums over i go to
[parts, B, J, D], which a small kernel of reductions.py adds in a fixed order and squashes. There are as many
parts as fill the device (launch_configs.split), whatever I is.

Input capsules of more than KB components are taken KB components at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from capsops.backends.triton import launch_configs, reductions
from capsops.backends.triton.capsules import (
    agreement,
    load_if,
    load_inputs,
    load_mask,
    load_outputs,
    load_weights,
    power,
    product,
    project,
    store_inputs,
    weight_mask,
    weight_offsets,
)
from capsops.backends.triton.launch import launch, on_device, unit
from capsops.backends.triton.launch_configs import ceil_div
from capsops.backends.triton.pairs import LogitsGradient, add_pairs, load_pairs, mask_bytes, pairs
from capsops.backends.triton.shared_routing import SharedRouting
from capsops.backends.triton.softmax import open_pairs, pair_logits, softmax_over_outputs

_SAMPLES = 128  # of a part of ∂W at the least: it takes as much memory as W in float32


@triton.jit
def _weight_offset(q, N: tl.constexpr, K: tl.constexpr):
    """The offset in W of component q of all I · K, for the first of its N columns."""
    return q // K * (N * K) + q % K


@triton.jit(do_not_specialize=["B", "I", "row_tiles", "column_tiles", "steps"])
def uniform_product_kernel(
    p_u, p_mask, p_w, p_s, p_out, B, I, row_tiles, column_tiles, steps, factor,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, Q: tl.constexpr, OF: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """factor · OF, with u [B, I · K], W [I · K, N = J · D] and s [B, N]; Q · steps terms a program.

    OF is "s" = u W, or "u" = s Wᵀ, or "w" = uᵀ s.
    """
    pid = tl.program_id(0).to(tl.int64)
    row = (pid % row_tiles) * R + tl.arange(0, R)
    column = ((pid // row_tiles) % column_tiles) * C + tl.arange(0, C)
    part = pid // row_tiles // column_tiles
    inputs = I.to(tl.int64) * K
    if OF == "s":
        rows, columns, terms = B, N, inputs
    elif OF == "u":
        rows, columns, terms = B, inputs, N
    else:
        rows, columns, terms = inputs, N, B
    m_row, m_column = (row < rows)[:, None], (column < columns)[None, :]
    first = part * steps
    b_sum = tl.zeros([R, C], tl.float32)
    for step in range(first, tl.minimum(first + steps, tl.cdiv(terms, Q))):
        term = step * Q + tl.arange(0, Q)
        if OF == "s":
            p_x = p_u + (row * inputs)[:, None] + term[None, :]
            p_y = p_w + _weight_offset(term, N, K)[:, None] + (column * K)[None, :]
        elif OF == "u":
            p_x = p_s + (row * N)[:, None] + term[None, :]
            p_y = p_w + (term * K)[:, None] + _weight_offset(column, N, K)[None, :]
        else:
            p_x = p_u + row[:, None] + (term * inputs)[None, :]
            p_y = p_s + (term * N)[:, None] + column[None, :]
        m_x = m_row & (term < terms)[None, :]
        if p_mask is not None:
            if OF == "s":
                m_x = m_x & load_mask(p_mask, row, row < rows, term // K, I)
            if OF == "w":
                m_x = m_x & tl.trans(load_mask(p_mask, term, term < terms, row // K, I))
        b_x = tl.load(p_x, mask=m_x, other=0.0)
        b_y = tl.load(p_y, mask=(term < terms)[:, None] & m_column, other=0.0)
        b_sum += product(b_x, b_y, UNIT)
    p_out += part * rows * columns
    if OF == "w":
        p_out += _weight_offset(row, N, K)[:, None] + (column * K)[None, :]
    else:
        p_out += (row * columns)[:, None] + column[None, :]
    if OF == "u" and p_mask is not None:
        b_sum = tl.where(load_mask(p_mask, row, row < rows, column // K, I), b_sum, 0.0)
    tl.store(p_out, (factor * b_sum).to(p_out.dtype.element_ty), mask=m_row & m_column)


# What kernels do inside their loops are functions: Triton reads a function once, the body of a loop twice for
# each loop around it.
@triton.jit
def _add_weighted(
    p_sums, begun, p_u, p_mask, p_w, b_u, c, row, m_row, i, j, I,
    J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, DB: tl.constexpr,
    KB: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Adds Σ_i c û of output capsule j to sums [B, J, D], which are 0 unless they have `begun`."""
    k = tl.arange(0, KB)
    for first in range(0, D, DB):
        d = first + tl.arange(0, DB)
        b_s = tl.zeros([R, DB], tl.float32)
        for k_first in range(0, K, KB):
            if K > KB:
                b_u = load_inputs(p_u, p_mask, row, m_row, i, k_first + k, I, K)
            b_x = tl.reshape(c[:, None, :] * b_u, [R, KB * C])
            b_w = load_weights(p_w, i, j, d, k_first + k, I, J, D, K, C, DB, KB)
            b_s += product(b_x, tl.trans(b_w), UNIT)
        p_bjd = p_sums + (row * (J * D) + j * D)[:, None] + d[None, :]
        m_bjd = m_row[:, None] & (d < D)[None, :]
        b_s += load_if(begun, p_bjd, m_bjd)
        tl.store(p_bjd, b_s, mask=m_bjd)


@triton.jit(do_not_specialize=["B", "I", "batch_tiles", "chunks"])
def routed_pass_kernel(
    p_u, p_mask, p_w, p_total, p_grad_s, starting, grad_logits, p_statistics, p_partials, B, I, batch_tiles,
    chunks,
    J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, DB: tl.constexpr,
    KB: tl.constexpr, LEAKY: tl.constexpr, GRADIENT: tl.constexpr, UNIFORM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Σ_i c û, or with GRADIENT Σ_i ∂b û, of a tile of samples over `chunks` blocks of C input capsules.

    With GRADIENT the statistics of the softmax are stored for the last pass, [3, B, I], and ∂b is added to
    ∂logits; each of these, and the sums, may be None. The first pass has no V but starting logits; UNIFORM: c
    of every open pair is 1.
    """
    pid = tl.program_id(0)
    row = (pid % batch_tiles).to(tl.int64) * R + tl.arange(0, R)
    m_row = row < B
    part = pid // batch_tiles
    first = part * chunks
    if p_partials is not None:
        p_partials = p_partials + part.to(tl.int64) * B * (J * D)
    for chunk in range(first, tl.minimum(first + chunks, tl.cdiv(I, C))):
        i = chunk * C + tl.arange(0, C)
        b_u = load_inputs(p_u, p_mask, row, m_row, i, tl.arange(0, KB), I, K)
        if not UNIFORM:
            top, factor, mean = softmax_over_outputs(
                p_u, p_mask, p_w, p_total, p_grad_s, starting, row, m_row, i, b_u, I, J, D, K, R, C, DB, KB,
                LEAKY, GRADIENT, UNIT,
            )  # fmt: skip
        if GRADIENT and p_statistics is not None:
            p_bi = p_statistics + (row * I)[:, None] + i[None, :]
            m_bi = m_row[:, None] & (i < I)[None, :]
            size = B.to(tl.int64) * I
            tl.store(p_bi, top, mask=m_bi)
            tl.store(p_bi + size, factor, mask=m_bi)
            tl.store(p_bi + 2 * size, mean, mask=m_bi)
        if grad_logits is not None:
            grad_all_j = tl.zeros([R, C], tl.float32)
        for j in range(J):
            logit = pair_logits(
                p_total, p_w, p_u, p_mask, starting, b_u, row, m_row, i, j, I, J, D, K, R, C, DB, KB, UNIT
            )
            c = open_pairs(logit) if UNIFORM else power(logit - top) * factor
            if GRADIENT:
                a = agreement(
                    p_grad_s, p_w, p_u, p_mask, b_u, row, m_row, i, j, I, J, D, K, R, C, DB, KB, UNIT
                )
                c = c * (a - mean)
            if grad_logits is not None:
                grad_b = tl.where(m_row[:, None] & (i < I)[None, :], c, 0.0)
                if grad_logits.outputs is None:
                    grad_all_j += grad_b
                else:
                    add_pairs(
                        grad_logits, pid % batch_tiles, part, grad_b, row[:, None], m_row[:, None],
                        i[None, :], (i < I)[None, :], j, None,
                    )  # fmt: skip
            if p_partials is not None:
                _add_weighted(
                    p_partials, chunk > first, p_u, p_mask, p_w, b_u, c, row, m_row, i, j, I, J, D, K, R, C,
                    DB, KB, UNIT,
                )  # fmt: skip
        if grad_logits is not None and grad_logits.outputs is None:
            add_pairs(
                grad_logits, pid % batch_tiles, part, grad_all_j, row[:, None], m_row[:, None],
                i[None, :], (i < I)[None, :], 0, None,
            )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def _add_pass(
    grad_u, grad_w, p_u, p_mask, p_w, p_v, p_s, p_statistics, statistics, m_bi, top, norm, logits, once, b_u,
    row, m_row, i, j, d, k, I,
    J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, DB: tl.constexpr,
    KB: tl.constexpr, DETACH: tl.constexpr, NEEDS_U: tl.constexpr, NEEDS_W: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """∂u + once · (c Q + ∂b P) and ∂W + (c u)ᵀ ∂s + (∂b u)ᵀ V of one pass and output capsule.

    The statistics of its softmax are `top` and `norm` with DETACH, which has no ∂b, else those in memory.
    """
    b_p = project(p_v, p_w, row, m_row, i, j, k, I, J, D, K, R, C, DB, KB, UNIT)
    b_q = project(p_s, p_w, row, m_row, i, j, k, I, J, D, K, R, C, DB, KB, UNIT)
    if K <= KB:
        logit = tl.sum(b_p * b_u, 1)
        a = tl.sum(b_q * b_u, 1)
    else:
        logit = agreement(p_v, p_w, p_u, p_mask, b_u, row, m_row, i, j, I, J, D, K, R, C, DB, KB, UNIT)
        a = agreement(p_s, p_w, p_u, p_mask, b_u, row, m_row, i, j, I, J, D, K, R, C, DB, KB, UNIT)
    if logits is not None:
        logit += logits
    if DETACH:
        c = power(logit - top) * norm
    else:
        b_top = tl.load(p_statistics, mask=m_bi, other=0.0)
        b_norm = tl.load(p_statistics + statistics, mask=m_bi, other=0.0)
        b_mean = tl.load(p_statistics + 2 * statistics, mask=m_bi, other=0.0)
        c = power(logit - b_top) * b_norm
        grad_b = c * (a - b_mean)
    if NEEDS_U:
        grad_u += (once * c)[:, None, :] * b_q
        if not DETACH:
            grad_u += (once * grad_b)[:, None, :] * b_p
    if NEEDS_W:
        b_s = load_outputs(p_s, row, m_row, j, d, J, D)
        grad_w += product(tl.trans(tl.reshape(c[:, None, :] * b_u, [R, KB * C])), b_s, UNIT)
        if not DETACH:
            b_v = load_outputs(p_v, row, m_row, j, d, J, D)
            b_y = tl.reshape(grad_b[:, None, :] * b_u, [R, KB * C])
            grad_w += product(tl.trans(b_y), b_v, UNIT)
    return grad_u, grad_w


@triton.jit(do_not_specialize=["B", "I", "passes", "size"])
def routed_gradient_kernel(
    p_u, p_mask, p_w, p_total, p_grad_s, starting, p_statistics, p_grad_u, p_grad_w, B, I, passes, size,
    factor,
    J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, DB: tl.constexpr,
    KB: tl.constexpr, LEAKY: tl.constexpr, DETACH: tl.constexpr, NEEDS_U: tl.constexpr,
    NEEDS_W: tl.constexpr, UNIFORM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """∂u and ∂W of C input capsules, KB components of each, over `size` samples.

    With DETACH of c ∂s in the last pass, which is not the first. Where K > KB each program makes the logits
    of all components. c of the first pass is `factor`; with starting logits it is their softmax or, UNIFORM,
    1 for every open pair.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(I, C)
    i = (pid % blocks) * C + tl.arange(0, C)
    depths = tl.cdiv(K, KB)
    k = (pid // blocks % depths) * KB + tl.arange(0, KB)
    part = (pid // blocks // depths).to(tl.int64)
    d = tl.arange(0, DB)
    begin = part * size
    end = tl.minimum(begin + size, B)
    layer = B.to(tl.int64) * (J * D)
    statistics = B.to(tl.int64) * I
    p_grad_w = p_grad_w + part * I * (J * D * K)
    for at in range(begin, end, R):
        row = at + tl.arange(0, R)
        m_row = row < end
        b_u = load_inputs(p_u, p_mask, row, m_row, i, k, I, K)
        grad_u = tl.zeros([R, KB, C], tl.float32)
        m_bi = m_row[:, None] & (i < I)[None, :]
        p_bi = p_statistics + (row * I)[:, None] + i[None, :]
        first = 1
        top = None
        norm = None
        if DETACH:
            first = passes - 1
            top, norm, _ = softmax_over_outputs(
                p_u, p_mask, p_w, p_total + (first - 1) * layer, p_grad_s, starting, row, m_row, i, b_u, I, J,
                D, K, R, C, DB, KB, LEAKY, False, UNIT,
            )  # fmt: skip
        elif starting is not None and not UNIFORM:
            top, norm, _ = softmax_over_outputs(
                p_u, p_mask, p_w, None, p_grad_s, starting, row, m_row, i, b_u, I, J, D, K, R, C, DB, KB,
                LEAKY, False, UNIT,
            )  # fmt: skip
        for j in range(J):
            first_c = factor
            logits = None
            if starting is not None:
                logits = load_pairs(
                    starting, row[:, None], m_row[:, None], i[None, :], (i < I)[None, :], j, None
                )
                if not DETACH:
                    first_c = tl.zeros([R, C], tl.float32)
                    if UNIFORM:
                        first_c += open_pairs(logits)
                    else:
                        first_c += power(logits - top) * norm
                    first_c = first_c[:, None, :]
            for d_first in range(0, D, DB):
                # ∂W of a block of d; ∂u, which takes all d at once, counts in the first of them.
                once = 1.0
                if D > DB:
                    once = tl.where(d_first == 0, 1.0, 0.0)
                grad_w = tl.zeros([KB * C, DB], tl.float32)
                if not DETACH:
                    if NEEDS_W:
                        b_s = load_outputs(p_grad_s, row, m_row, j, d_first + d, J, D)
                        grad_w += product(tl.trans(tl.reshape(first_c * b_u, [R, KB * C])), b_s, UNIT)
                    if NEEDS_U:
                        b_q = project(p_grad_s, p_w, row, m_row, i, j, k, I, J, D, K, R, C, DB, KB, UNIT)
                        grad_u += (first_c * once) * b_q
                for t in range(first, passes):
                    grad_u, grad_w = _add_pass(
                        grad_u, grad_w, p_u, p_mask, p_w, p_total + (t - 1) * layer, p_grad_s + t * layer,
                        p_bi + (t - 1) * 3 * statistics, statistics, m_bi, top, norm, logits, once, b_u, row,
                        m_row, i, j, d_first + d, k, I, J, D, K, R, C, DB, KB, DETACH, NEEDS_U, NEEDS_W, UNIT,
                    )  # fmt: skip
                if NEEDS_W:
                    b_w = tl.permute(tl.reshape(grad_w, [KB, C, DB]), (1, 2, 0))
                    p_ijdk = p_grad_w + weight_offsets(i, j, d_first + d, k, J, D, K)
                    m_ijdk = weight_mask(i, d_first + d, k, I, D, K)
                    b_w += load_if(at > begin, p_ijdk, m_ijdk)
                    tl.store(p_ijdk, b_w.to(p_grad_w.dtype.element_ty), mask=m_ijdk)
        if NEEDS_U:
            store_inputs(p_grad_u, p_mask, grad_u, row, m_row, i, k, I, K)
        tl.debug_barrier()


class Layer:
    """The shapes of one call, and the launches of its passes."""

    def __init__(
        self,
        u: Tensor,
        weight: Tensor,
        logits: Tensor | None,
        mask: Tensor | None,
        iterations: int,
        leaky: bool,
    ) -> None:
        self.u, self.weight, self.iterations, self.leaky = u, weight, iterations, leaky
        self.starting, self.mask = pairs(logits), mask_bytes(mask)
        self.B, self.I, _ = u.shape
        _, self.J, self.D, self.K = weight.shape
        self.unit = unit(u)

    @property
    def first_factor(self) -> float:
        """What û is multiplied by in the first pass, without starting logits."""
        return 1 / (self.J + self.leaky) if self.iterations else 1.0

    def sums_of_pass(self, parts: int) -> Tensor:
        return self.u.new_empty(parts, self.B, self.J, self.D, dtype=torch.float32)

    def routed_tile(self, gradient: bool = False) -> launch_configs.Tile:
        """The block of a routed pass, or of the last `gradient` pass."""
        if gradient:
            entry = launch_configs.GRADIENT[launch_configs.kind(self.u, self.unit, self.D)]
        else:
            entry = launch_configs.ROUTED[launch_configs.routed(self.u, self.unit, self.D)]
        if self.starting is not None:
            entry = launch_configs.with_logits(entry, gradient)
        return launch_configs.tile(entry, self.B, self.I, self.D, self.K)

    def routed_options(self, tile: launch_configs.Tile) -> dict[str, object]:
        return {
            "J": self.J, "D": self.D, "K": self.K, "LEAKY": self.leaky, "UNIT": self.unit,
            "UNIFORM": self.starting is not None and not self.iterations, **tile.options(),
        }  # fmt: skip

    def uniform_blocks(self, of: str) -> launch_configs.Product:
        """The launch configuration of one of the products of uniform_product_kernel."""
        columns, inputs = self.J * self.D, self.I * self.K
        sizes = {
            "s": (self.B, columns, inputs),
            "u": (self.B, inputs, columns),
            "w": (inputs, columns, self.B),
        }
        return launch_configs.product(*sizes[of], self.u)

    def uniform_product(
        self, of: str, blocks: launch_configs.Product, s: Tensor, partials: Tensor, factor: float
    ) -> None:
        launch(
            uniform_product_kernel, blocks.programs, self.u, self.mask, self.weight, s, partials, self.B,
            self.I, blocks.row_tiles, blocks.column_tiles, blocks.steps, factor, N=self.J * self.D, K=self.K,
            OF=of, UNIT=self.unit, **blocks.options(),
            **({} if self.mask is None else launch_configs.all_registers()),
        )  # fmt: skip

    def uniform_pass(self) -> Tensor:
        """Sums of û over parts of i [parts, B, J, D]."""
        blocks = self.uniform_blocks("s")
        partials = self.sums_of_pass(blocks.parts)
        self.uniform_product("s", blocks, partials, partials, 1.0)
        return partials

    def uniform_gradient(self, of: str, grad_s: Tensor, factor: float) -> Tensor:
        """∂u or ∂W of a layer whose only couplings are uniform."""
        blocks = self.uniform_blocks(of)
        like = self.u if of == "u" else self.weight
        partials = reductions.partial_results(like, blocks.parts)
        self.uniform_product(of, blocks, grad_s, partials, factor)
        return reductions.added(partials, like.dtype)

    def routed_blocks(self) -> tuple[launch_configs.Tile, int, launch_configs.Split]:
        """The tile of routed_pass_kernel, the number of tiles of samples, and the parts of i."""
        tile = self.routed_tile()
        batch_tiles = ceil_div(self.B, tile.rows)
        chunks = ceil_div(self.I, tile.inputs)
        return tile, batch_tiles, launch_configs.split(chunks, batch_tiles, self.u, tile.resident)

    def logits_gradient(self, logits: Tensor) -> LogitsGradient:
        _, batch_tiles, parts = self.routed_blocks()
        return LogitsGradient(logits, batch_tiles, parts.number)

    def routed_pass(
        self,
        total: Tensor | None,
        grad_s: Tensor | None,
        statistics: Tensor | None,
        grad_logits: LogitsGradient | None = None,
    ) -> Tensor:
        """Sums over parts of i [parts, B, J, D] of c û or, with ∂s, of ∂b û; fills `statistics`.

        Adds ∂b to `grad_logits`. Without V the logits are the starting ones.
        """
        partials = self.sums_of_pass(self.routed_blocks()[2].number)
        self._launch_pass(total, grad_s, statistics, grad_logits, partials)
        return partials

    def add_logits_gradient(self, total: Tensor | None, grad_s: Tensor, grad_logits: LogitsGradient) -> None:
        """Adds ∂b of one pass to `grad_logits`."""
        self._launch_pass(total, grad_s, None, grad_logits, None)

    def _launch_pass(
        self,
        total: Tensor | None,
        grad_s: Tensor | None,
        statistics: Tensor | None,
        grad_logits: LogitsGradient | None,
        partials: Tensor | None,
    ) -> None:
        tile, batch_tiles, parts = self.routed_blocks()
        launch(
            routed_pass_kernel, batch_tiles * parts.number, self.u, self.mask, self.weight, total,
            total if grad_s is None else grad_s, self.starting,
            None if grad_logits is None else grad_logits.arguments(), statistics, partials, self.B, self.I,
            batch_tiles, parts.size, GRADIENT=grad_s is not None, **self.routed_options(tile),
        )  # fmt: skip

    def forward(
        self, bias: Tensor | None, passes: int, squash_output: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """v, s of the first `passes` passes, and V; v is set by the last pass of all."""
        v = self.u.new_empty(self.B, self.J, self.D)
        s = self.sums_of_pass(passes)
        total = s.new_empty(s.shape[1:])
        last = max(self.iterations, 1) - 1
        for t in range(passes):
            uniform = t == 0 and self.starting is None
            V = None if t == 0 else total
            partials = self.uniform_pass() if uniform else self.routed_pass(V, None, V)
            count = self.J + self.leaky if uniform and self.iterations else 1
            reductions.finish_pass(partials, bias, s[t], total, v, count, t, last, squash_output)
        return v, s, total

    def routed_gradient(
        self, total: Tensor, grad_s: Tensor, statistics: Tensor, detach: bool, needs_u: bool,
        needs_weight: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """∂u and ∂W, from Vᵗ, ∂sᵗ and, without `detach`, the softmax statistics of all passes."""
        tile = self.routed_tile(gradient=True)
        blocks = ceil_div(self.I, tile.inputs) * ceil_div(self.K, tile.depth)
        waves = 1 if self.starting is not None else 2
        parts = launch_configs.split(self.B, blocks, self.u, tile.resident, tile.rows, _SAMPLES, waves)
        grad_u = torch.empty_like(self.u) if needs_u else self.u.new_empty(0)
        count = parts.number if needs_weight else 0
        added_up = parts.size > tile.rows
        partials = reductions.partial_results(self.weight, count, wide=added_up)
        launch(
            routed_gradient_kernel, blocks * parts.number, self.u, self.mask, self.weight, total, grad_s,
            self.starting, statistics, grad_u, partials, self.B, self.I, len(grad_s), parts.size,
            self.first_factor, DETACH=detach, NEEDS_U=needs_u, NEEDS_W=needs_weight,
            **self.routed_options(tile),
        )  # fmt: skip
        return grad_u, reductions.added(partials, self.weight.dtype)


def _layer(
    u: Tensor, weight: Tensor, logits: Tensor | None, mask: Tensor | None, iterations: int, leaky: bool
) -> Layer | SharedRouting:
    if weight.dim() == 3:
        return SharedRouting(u, weight, len(weight), logits, mask, iterations, leaky)
    return Layer(u, weight, logits, mask, iterations, leaky)


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
    with on_device(u):
        layer = _layer(u, weight, logits, mask, iterations, leaky)
        v, s, _ = layer.forward(bias, max(iterations, 1), squash_output)
    return v, s


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
    with on_device(u):
        if weight.dim() == 3:
            shared = SharedRouting(u, weight, len(weight), logits, mask, iterations, leaky)
            return shared.backward(grad, s, detach, squash_output, needs_u, needs_weight, needs_logits)
        layer = Layer(u, weight, logits, mask, iterations, leaky)
        backward = reductions.Backward(grad, s, squash_output)
        total, grad_s = backward.total, backward.grad_s
        last = len(s) - 1
        detach = detach and last > 0
        statistics = s.new_empty(0 if detach else (last, 3, layer.B, layer.I))
        grad_logits = None
        if needs_logits and logits is not None:
            grad_logits = layer.logits_gradient(logits)
        if not detach:
            backward.reduce(lambda v, grad, t: layer.routed_pass(v, grad, statistics[t], grad_logits))
        if grad_logits is not None and iterations:
            t = last if detach else 0
            layer.add_logits_gradient(total[t - 1] if t else None, grad_s[t], grad_logits)
        grad_u, grad_weight = u.new_empty(0), u.new_empty(0)
        if last == 0 and logits is None:
            if needs_u:
                grad_u = layer.uniform_gradient("u", grad_s, layer.first_factor)
            if needs_weight:
                grad_weight = layer.uniform_gradient("w", grad_s, layer.first_factor)
        elif needs_u or needs_weight:
            grad_u, grad_weight = layer.routed_gradient(
                total, grad_s, statistics, detach, needs_u, needs_weight
            )
        grad_bias = reductions.bias_gradient(grad_s[last if detach else 0 :], weight)
    return (
        grad_u,
        grad_weight,
        grad_bias,
        u.new_empty(0) if grad_logits is None else grad_logits.result(),
    )
