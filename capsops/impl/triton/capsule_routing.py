"""A capsule layer without û: forward and backward passes that recompute the predictions, tile by tile.

Forward, for t = 1…T: cᵗ = softmax_j(û · Vᵗ⁻¹), sᵗ = Σ_i cᵗ û + β, Vᵗ = Vᵗ⁻¹ + squash(sᵗ).
Backward: for t = T…2, a = û · ∂sᵗ, ∂b = c (a − Σ_j c a), ∂Vᵗ⁻¹ = ∂Vᵗ + Σ_i ∂b û; then ∂û = Σ_t (cᵗ ∂sᵗ + ∂bᵗ Vᵗ⁻¹),
∂u = Σ_j Wᵀ ∂û, ∂W = Σ_b ∂û uᵀ.

A program of a pass holds a tile of samples and all j (V, sums, û of one i) in registers and walks over its share of
the input capsules: û by the matrix unit, logits as sums over d, softmax in registers. Its sums over i go to
[splits, B, J, D], which a small kernel of sums.py adds in a fixed order and squashes. Where J × D fits no tile, one
kernel first leaves, for each (b, i), the largest logit, 1 / Σ exp and, backward, Σ_j c a; then tiles of j need
nothing of one another.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from capsops.impl.triton import sums, tiles
from capsops.impl.triton.capsules import (
    dots,
    input_gradient,
    largest,
    load_inputs,
    load_parts,
    load_weight_parts,
    logit_gradients,
    logits,
    powers,
    predict,
    product,
    products,
    scaled,
    scaled_capsules,
    softmax,
    store_parts,
    store_weight_parts,
    total,
    weight_gradient,
    weighted,
    zero_parts,
    zero_weight_parts,
)
from capsops.impl.triton.launch import INTERPRETED, launch, on_device, precision
from capsops.impl.triton.tiles import ceil_div


@triton.jit(do_not_specialize=["B", "inputs", "batch_tiles", "column_tiles", "size"])
def uniform_pass_kernel(
    p_u, p_w, p_partials, B, inputs, batch_tiles, column_tiles, size,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, Q: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Σ_i û: the product of u [B, I · K] and W [I · K, N = J · D], `size` of its I · K terms a program."""
    pid = tl.program_id(0).to(tl.int64)
    row = (pid % batch_tiles) * R + tl.arange(0, R)
    n = ((pid // batch_tiles) % column_tiles) * C + tl.arange(0, C)
    part = pid // batch_tiles // column_tiles
    q = tl.arange(0, Q)
    m_row, m_n = (row < B)[:, None], (n < N)[:, None]
    p_u = p_u + row[:, None] * inputs
    p_w = p_w + n[:, None] * K
    first = part * size
    last = tl.minimum(first + size, inputs)
    b_sum = tl.zeros([R, C], tl.float32)
    for at in range(first, last, Q):
        m_q = (at + q < last)[None, :]
        b_u = tl.load(p_u + (at + q)[None, :], mask=m_row & m_q, other=0.0)
        i = (at + q) // K
        k = (at + q) % K
        b_w = tl.load(p_w + (i * (N * K) + k)[None, :], mask=m_n & m_q, other=0.0)
        b_sum += product(b_u, tl.trans(b_w), PRECISION, WIDE)
    p_partials = p_partials + (part * B + row)[:, None] * N + n[None, :]
    tl.store(p_partials, b_sum, mask=m_row & (n < N)[None, :])


@triton.jit(do_not_specialize=["B", "I", "batch_tiles", "size"])
def softmax_statistics_kernel(
    p_u, p_w, p_total, p_grad_s, p_statistics, B, I, batch_tiles, size,
    J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, R: tl.constexpr, DP: tl.constexpr,
    PARTS: tl.constexpr, EXACT: tl.constexpr, TILES: tl.constexpr, LEAKY: tl.constexpr,
    GRADIENT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """For each (b, i), over all tiles of j: the largest logit, 1 / Σ exp(b − largest), and Σ_j c a."""
    pid = tl.program_id(0).to(tl.int64)
    row = (pid % batch_tiles) * R + tl.arange(0, R)
    m_row = row < B
    first = (pid // batch_tiles) * size
    for i in range(first, tl.minimum(first + size, I)):
        b_u = load_inputs(p_u, (row * I + i) * K, m_row, K, KP)
        top = tl.full([R], -float("inf"), tl.float32)
        z = tl.zeros([R], tl.float32)
        mean = tl.zeros([R], tl.float32)
        if LEAKY:
            top = tl.zeros([R], tl.float32)
            z = tl.full([R], 1.0, tl.float32)
        for tile in range(TILES):
            j = tile * PARTS[0]
            weights = load_weight_parts(p_w + i * (J * D * K), j, J, D, K, DP, KP, PARTS, EXACT)
            u_hats = predict(b_u, weights, R, DP, PARTS, PRECISION, WIDE)
            vs = load_parts(p_total, row * (J * D), m_row, j, J, D, DP, PARTS, EXACT)
            bs = logits(u_hats, vs, j, J, PARTS, EXACT)
            higher = tl.maximum(top, largest(bs, False))
            shrink = tl.exp(top - higher)
            es = powers(bs, higher)
            z = z * shrink + total(es)
            if GRADIENT:
                grads = load_parts(p_grad_s, row * (J * D), m_row, j, J, D, DP, PARTS, EXACT)
                mean = mean * shrink + total(products(es, dots(u_hats, grads)))
            top = higher
        at = row * I + i
        size_of_one = B.to(tl.int64) * I
        tl.store(p_statistics + at, top, mask=m_row)
        tl.store(p_statistics + size_of_one + at, 1.0 / z, mask=m_row)
        if GRADIENT:
            tl.store(p_statistics + 2 * size_of_one + at, mean / z, mask=m_row)


@triton.jit
def _couplings(bs, p_statistics, at, size, m_row, LEAKY: tl.constexpr, WHOLE: tl.constexpr):
    """c of a tile: the softmax itself where the tile holds all j (WHOLE), else by the stored statistics."""
    if WHOLE:
        return softmax(bs, LEAKY)
    else:
        top = tl.load(p_statistics + at, mask=m_row, other=0.0)
        factor = tl.load(p_statistics + size + at, mask=m_row, other=0.0)
        return scaled(powers(bs, top), factor)


@triton.jit
def _mean(cs, agreements, p_statistics, at, size, m_row, WHOLE: tl.constexpr):
    """Σ_j c a [R]."""
    if WHOLE:
        return total(products(cs, agreements))
    else:
        return tl.load(p_statistics + 2 * size + at, mask=m_row, other=0.0)


@triton.jit(do_not_specialize=["B", "I", "batch_tiles", "size"])
def routed_pass_kernel(
    p_u, p_w, p_total, p_grad_s, p_statistics, p_partials, B, I, batch_tiles, size,
    J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, R: tl.constexpr, DP: tl.constexpr,
    PARTS: tl.constexpr, EXACT: tl.constexpr, TILES: tl.constexpr, LEAKY: tl.constexpr,
    GRADIENT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Σ_i c û, or with GRADIENT Σ_i ∂b û, over `size` input capsules, for a tile of samples and one of j."""
    WHOLE: tl.constexpr = TILES == 1
    pid = tl.program_id(0).to(tl.int64)
    row = (pid % batch_tiles) * R + tl.arange(0, R)
    m_row = row < B
    j = ((pid // batch_tiles) % TILES).to(tl.int32) * PARTS[0]
    if WHOLE:
        j = 0
    part = pid // batch_tiles // TILES
    size_of_one = B.to(tl.int64) * I
    vs = load_parts(p_total, row * (J * D), m_row, j, J, D, DP, PARTS, EXACT)
    if GRADIENT:
        grads = load_parts(p_grad_s, row * (J * D), m_row, j, J, D, DP, PARTS, EXACT)
    sums = zero_parts(R, DP, PARTS)
    first = part * size
    for i in range(first, tl.minimum(first + size, I)):
        b_u = load_inputs(p_u, (row * I + i) * K, m_row, K, KP)
        weights = load_weight_parts(p_w + i * (J * D * K), j, J, D, K, DP, KP, PARTS, EXACT)
        u_hats = predict(b_u, weights, R, DP, PARTS, PRECISION, WIDE)
        bs = logits(u_hats, vs, j, J, PARTS, EXACT)
        cs = _couplings(bs, p_statistics, row * I + i, size_of_one, m_row, LEAKY, WHOLE)
        if GRADIENT:
            agreements = dots(u_hats, grads)
            mean = _mean(cs, agreements, p_statistics, row * I + i, size_of_one, m_row, WHOLE)
            cs = logit_gradients(cs, agreements, mean)
        sums = weighted(sums, cs, u_hats)
    store_parts(p_partials, sums, (part * B + row) * (J * D), m_row, j, J, D, DP, PARTS, EXACT)


@triton.jit
def _prediction_gradient(
    b_u, weights, p_total, p_grad_s, p_statistics, row, m_row, i, j, B, I, passes, first, factor,
    J: tl.constexpr, D: tl.constexpr, R: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr,
    EXACT: tl.constexpr, WHOLE: tl.constexpr, LEAKY: tl.constexpr, ROUTED: tl.constexpr,
    DETACH: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """∂û of a tile: Σ_t (cᵗ ∂sᵗ + ∂bᵗ Vᵗ⁻¹); with DETACH cᵀ ∂sᵀ alone."""
    rows = row * (J * D)
    layer = B.to(tl.int64) * (J * D)
    size_of_one = B.to(tl.int64) * I
    found = zero_parts(R, DP, PARTS)
    if not DETACH or not ROUTED:
        found = scaled_capsules(load_parts(p_grad_s, rows, m_row, j, J, D, DP, PARTS, EXACT), factor)
    if ROUTED:
        u_hats = predict(b_u, weights, R, DP, PARTS, PRECISION, WIDE)
        for t in range(first, passes):
            vs = load_parts(p_total + (t - 1) * layer, rows, m_row, j, J, D, DP, PARTS, EXACT)
            grads = load_parts(p_grad_s + t * layer, rows, m_row, j, J, D, DP, PARTS, EXACT)
            bs = logits(u_hats, vs, j, J, PARTS, EXACT)
            p_of_pass = p_statistics + (t - 1) * 3 * size_of_one
            at = row * I + i
            cs = _couplings(bs, p_of_pass, at, size_of_one, m_row, LEAKY, WHOLE)
            found = weighted(found, cs, grads)
            if not DETACH:
                agreements = dots(u_hats, grads)
                mean = _mean(cs, agreements, p_of_pass, at, size_of_one, m_row, WHOLE)
                found = weighted(found, logit_gradients(cs, agreements, mean), vs)
    return found


@triton.jit(do_not_specialize=["B", "I", "passes", "first", "size"])
def gradient_kernel(
    p_u, p_w, p_total, p_grad_s, p_statistics, p_grad_u, p_grad_w, B, I, passes, first, size, factor,
    J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, R: tl.constexpr, DP: tl.constexpr,
    PARTS: tl.constexpr, EXACT: tl.constexpr, TILES: tl.constexpr, LEAKY: tl.constexpr,
    ROUTED: tl.constexpr, DETACH: tl.constexpr, NEEDS_U: tl.constexpr, NEEDS_W: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """∂u and ∂W of one i over `size` samples.

    With several tiles of j, a program that makes ∂u walks over all of them, one that makes ∂W has one.
    """
    WHOLE: tl.constexpr = TILES == 1
    pid = tl.program_id(0).to(tl.int64)
    i = pid % I
    rest = pid // I
    if NEEDS_U:
        part = rest
        tile_first = 0
        tile_last = TILES
    else:
        part = rest // TILES
        tile_first = (rest % TILES).to(tl.int32)
        tile_last = tile_first + 1
    p_w = p_w + i * (J * D * K)
    begin = part * size
    end = tl.minimum(begin + size, B)
    if NEEDS_W:
        grad_w = zero_weight_parts(DP, KP, PARTS)
    if WHOLE or not NEEDS_U:
        weights = load_weight_parts(p_w, tile_first * PARTS[0], J, D, K, DP, KP, PARTS, EXACT)
    for at in range(begin, end, R):
        row = at + tl.arange(0, R)
        m_row = row < end
        b_u = load_inputs(p_u, (row * I + i) * K, m_row, K, KP)
        if WHOLE or not NEEDS_U:
            grads = _prediction_gradient(
                b_u, weights, p_total, p_grad_s, p_statistics, row, m_row, i, tile_first * PARTS[0], B, I,
                passes, first, factor, J, D, R, DP, PARTS, EXACT, WHOLE, LEAKY, ROUTED, DETACH, PRECISION,
                WIDE,
            )  # fmt: skip
            if NEEDS_W:
                grad_w = weight_gradient(grad_w, grads, b_u, R, DP, PARTS, PRECISION, WIDE)
            if NEEDS_U:
                b_grad_u = input_gradient(grads, weights, R, DP, PARTS, PRECISION, WIDE)
        else:
            b_grad_u = tl.zeros([R, KP], tl.float32)
            for tile in range(TILES):
                j = tile * PARTS[0]
                tile_weights = load_weight_parts(p_w, j, J, D, K, DP, KP, PARTS, EXACT)
                grads = _prediction_gradient(
                    b_u, tile_weights, p_total, p_grad_s, p_statistics, row, m_row, i, j, B, I, passes,
                    first, factor, J, D, R, DP, PARTS, EXACT, WHOLE, LEAKY, ROUTED, DETACH, PRECISION, WIDE,
                )  # fmt: skip
                b_grad_u += input_gradient(grads, tile_weights, R, DP, PARTS, PRECISION, WIDE)
        if NEEDS_U:
            k = tl.arange(0, KP)
            p = p_grad_u + ((row * I + i) * K)[:, None] + k[None, :]
            tl.store(p, b_grad_u.to(p_grad_u.dtype.element_ty), mask=m_row[:, None] & (k < K)[None, :])
    if NEEDS_W:
        p_grad_w = p_grad_w + (part * I + i) * (J * D * K)
        store_weight_parts(p_grad_w, grad_w, tile_first * PARTS[0], J, D, K, DP, KP, PARTS)


class Layer:
    """The shapes of one call, and the launches of its passes."""

    def __init__(self, u: Tensor, weight: Tensor, leaky: bool) -> None:
        self.u, self.weight, self.leaky = u, weight, leaky
        self.B, self.I, _ = u.shape
        _, self.J, self.D, self.K = weight.shape
        self.tiling = tiles.capsules(self.J, self.D)
        self.whole = self.tiling.tiles == 1
        self.products = {"PRECISION": precision(u), "WIDE": INTERPRETED}
        self.options = {
            "J": self.J, "D": self.D, "K": self.K, "KP": tiles.depth(self.K), "LEAKY": leaky,
            "TILES": self.tiling.tiles, **self.tiling.options(), **self.products,
        }  # fmt: skip

    def partials(self, parts: int) -> Tensor:
        return self.u.new_empty(parts, self.B, self.J, self.D, dtype=torch.float32)

    def statistics(self, passes: int) -> Tensor:
        """Room for what softmax_statistics_kernel leaves, of so many passes."""
        return self.u.new_empty(0 if self.whole else (passes, 3, self.B, self.I), dtype=torch.float32)

    def uniform_pass(self) -> Tensor:
        """Partial sums of û over i [splits, B, J, D]."""
        columns, inputs = self.J * self.D, self.I * self.K
        tile = tiles.uniform_pass(self.B, columns, inputs, self.u)
        batch_tiles, column_tiles = ceil_div(self.B, tile.rows), ceil_div(columns, tile.columns)
        parts = tiles.split(inputs, batch_tiles * column_tiles, self.u, tile.depth)
        partials = self.partials(parts.count)
        launch(
            uniform_pass_kernel, batch_tiles * column_tiles * parts.count, self.u, self.weight, partials,
            self.B, inputs, batch_tiles, column_tiles, parts.size, N=columns, K=self.K, R=tile.rows,
            C=tile.columns, Q=tile.depth, num_warps=tile.warps, num_stages=tile.stages, **self.products,
        )  # fmt: skip
        return partials

    def softmax_statistics(self, total: Tensor, grad_s: Tensor | None, statistics: Tensor) -> None:
        """Fills `statistics` [3, B, I] of the pass with V = `total`, where a tile does not hold all j."""
        if self.whole:
            return
        tile = tiles.routed_pass(self.B, self.tiling.columns, grad_s is not None)
        batch_tiles = ceil_div(self.B, tile.rows)
        parts = tiles.split(self.I, batch_tiles, self.u)
        launch(
            softmax_statistics_kernel, batch_tiles * parts.count, self.u, self.weight, total,
            total if grad_s is None else grad_s, statistics, self.B, self.I, batch_tiles, parts.size,
            R=tile.rows, GRADIENT=grad_s is not None, num_warps=tile.warps, num_stages=tile.stages,
            **self.options,
        )  # fmt: skip

    def routed_pass(self, total: Tensor, grad_s: Tensor | None, statistics: Tensor) -> Tensor:
        """Partial sums over i [splits, B, J, D] of c û, or, with ∂s given, of ∂b û."""
        self.softmax_statistics(total, grad_s, statistics)
        tile = tiles.routed_pass(self.B, self.tiling.columns, grad_s is not None)
        batch_tiles = ceil_div(self.B, tile.rows)
        parts = tiles.split(self.I, batch_tiles * self.tiling.tiles, self.u)
        partials = self.partials(parts.count)
        launch(
            routed_pass_kernel, batch_tiles * self.tiling.tiles * parts.count, self.u, self.weight, total,
            total if grad_s is None else grad_s, statistics, partials, self.B, self.I, batch_tiles,
            parts.size, R=tile.rows, GRADIENT=grad_s is not None, num_warps=tile.warps,
            num_stages=tile.stages, **self.options,
        )  # fmt: skip
        return partials

    def forward(self, bias: Tensor | None, iterations: int, passes: int) -> tuple[Tensor, Tensor, Tensor]:
        """v, s of the first `passes` passes of `iterations`, and V; v is set by the last pass of all."""
        v = self.u.new_empty(self.B, self.J, self.D)
        s = self.partials(passes)
        total = s.new_empty(s.shape[1:])
        statistics = self.statistics(1)
        count = self.J + self.leaky if iterations else 1
        last = max(iterations, 1) - 1
        for t in range(passes):
            partials = self.uniform_pass() if t == 0 else self.routed_pass(total, None, statistics)
            sums.finish_pass(partials, bias, s[t], total, v, count if t == 0 else 1, t == 0, t == last)
        return v, s, total

    def gradient(
        self, total: Tensor, grad_s: Tensor, statistics: Tensor, iterations: int, detach: bool, needs_u: bool,
        needs_weight: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """∂u and ∂W, given Vᵗ, ∂sᵗ and the softmax statistics of all passes."""
        u, weight = self.u, self.weight
        grad_u, grad_weight = (
            torch.empty_like(x) if needed else x.new_empty(0)
            for x, needed in ((u, needs_u), (weight, needs_weight))
        )
        tile = tiles.gradient(self.B, self.tiling.columns)
        options = {
            **self.options, "ROUTED": iterations > 1, "DETACH": detach, "R": tile.rows,
            "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip
        passes = len(grad_s)
        first = passes - 1 if detach and iterations > 1 else 1
        factor = 1 / (self.J + self.leaky) if iterations else 1.0
        # A program makes both gradients where one tile holds all j; else each has programs of its own.
        both = self.whole and needs_u and needs_weight
        if needs_u and not both:
            parts = tiles.split(self.B, self.I, u, tile.rows)
            launch(
                gradient_kernel, self.I * parts.count, u, weight, total, grad_s, statistics, grad_u, grad_u,
                self.B, self.I, passes, first, parts.size, factor, NEEDS_U=True, NEEDS_W=False, **options,
            )  # fmt: skip
        if needs_weight:
            parts = tiles.split(self.B, self.I * self.tiling.tiles, u, tile.rows)
            partials = grad_weight
            if parts.count > 1:
                partials = weight.new_empty(parts.count, *weight.shape, dtype=torch.float32)
            launch(
                gradient_kernel, self.I * self.tiling.tiles * parts.count, u, weight, total, grad_s,
                statistics, grad_u, partials, self.B, self.I, passes, first, parts.size, factor,
                NEEDS_U=both, NEEDS_W=True, **options,
            )  # fmt: skip
            if parts.count > 1:
                sums.add_rows(partials, grad_weight)
        return grad_u, grad_weight


def capsule_routing(
    u: Tensor, weight: Tensor, bias: Tensor | None, iterations: int, leaky: bool
) -> tuple[Tensor, Tensor]:
    with on_device(u):
        v, s, _ = Layer(u, weight, leaky).forward(bias, iterations, max(iterations, 1))
    return v, s


def capsule_routing_backward(
    grad: Tensor,
    u: Tensor,
    weight: Tensor,
    s: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    needs_u: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with on_device(u):
        layer = Layer(u, weight, leaky)
        total, grad_s = sums.prepare_backward(grad, s)
        last = len(s) - 1
        statistics = layer.statistics(last)
        if detach:
            if last:
                layer.softmax_statistics(total[last - 1], None, statistics[last - 1 :])
            grad_bias = sums.bias_gradient(grad_s[last:], weight)
        else:
            grad_total = s.new_empty(s.shape[1:])
            for t in range(last, 0, -1):
                partials = layer.routed_pass(total[t - 1], grad_s[t], statistics[t - 1 :])
                sums.finish_reduction(partials, s[t - 1], grad_total, grad_s[t - 1], t == last)
            grad_bias = sums.bias_gradient(grad_s, weight)
        grad_u, grad_weight = layer.gradient(
            total, grad_s, statistics, iterations, detach, needs_u, needs_weight
        )
    return grad_u, grad_weight, grad_bias
