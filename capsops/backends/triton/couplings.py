"""The couplings of the last pass, c = softmax_j(û · Vᵀ⁻¹), û recomputed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from capsops.backends.triton.capsule_routing import Layer
from capsops.backends.triton.capsules import load_inputs, load_mask, power
from capsops.backends.triton.launch import launch, on_device
from capsops.backends.triton.launch_configs import ceil_div
from capsops.backends.triton.shared_routing import SharedRouting
from capsops.backends.triton.softmax import open_pairs, pair_logits, softmax_over_outputs


@triton.jit(do_not_specialize=["B", "I", "batch_tiles"])
def couplings_kernel(
    p_u, p_mask, p_w, p_total, starting, p_c, B, I, batch_tiles,
    J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, DB: tl.constexpr,
    KB: tl.constexpr, LEAKY: tl.constexpr, UNIFORM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """c [B, I, J] of a tile of samples and C input capsules. The first pass has no V but starting logits."""
    pid = tl.program_id(0)
    row = (pid % batch_tiles).to(tl.int64) * R + tl.arange(0, R)
    m_row = row < B
    i = (pid // batch_tiles) * C + tl.arange(0, C)
    b_u = load_inputs(p_u, p_mask, row, m_row, i, tl.arange(0, KB), I, K)
    if not UNIFORM:
        top, factor, _ = softmax_over_outputs(
            p_u, p_mask, p_w, p_total, p_total, starting, row, m_row, i, b_u, I, J, D, K, R, C, DB, KB, LEAKY,
            False, UNIT,
        )  # fmt: skip
    p_bi = p_c + (row * I)[:, None] * J + (i * J)[None, :]
    m_bi = m_row[:, None] & (i < I)[None, :]
    for j in range(J):
        logit = pair_logits(
            p_total, p_w, p_u, p_mask, starting, b_u, row, m_row, i, j, I, J, D, K, R, C, DB, KB, UNIT
        )
        c = open_pairs(logit) if UNIFORM else power(logit - top) * factor
        if p_mask is not None:
            c = tl.where(load_mask(p_mask, row, m_row, i, I), c, 0.0)
        tl.store(p_bi + j, c.to(p_c.dtype.element_ty), mask=m_bi)


def couplings(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
) -> Tensor:
    with on_device(u):
        if weight.dim() == 3:
            return SharedRouting(u, weight, len(weight), logits, mask, iterations, leaky).couplings(bias)
        c = torch.empty(*u.shape[:2], weight.shape[1], dtype=u.dtype, device=u.device)
        layer = Layer(u, weight, logits, mask, iterations, leaky)
        if iterations <= 1 and logits is None:
            c.fill_(layer.first_factor)
            return c if mask is None else c.mul_(mask.unsqueeze(-1))
        total = None
        if iterations > 1:
            _, _, total = layer.forward(bias, iterations - 1)
        tile = layer.routed_tile()
        batch_tiles = ceil_div(layer.B, tile.rows)
        launch(
            couplings_kernel, batch_tiles * ceil_div(layer.I, tile.inputs), u, layer.mask, weight, total,
            layer.starting, c, layer.B, layer.I, batch_tiles, **layer.routed_options(tile),
        )  # fmt: skip
    return c
