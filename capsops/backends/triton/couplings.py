"""The couplings of the last pass, c = softmax_j(û · Vᵀ⁻¹), û recomputed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from capsops.backends.triton import launch_configs
from capsops.backends.triton.capsule_routing import Layer
from capsops.backends.triton.capsules import agreement, load_inputs, power
from capsops.backends.triton.launch import launch, on_device
from capsops.backends.triton.launch_configs import ceil_div
from capsops.backends.triton.softmax import softmax_over_outputs


@triton.jit(do_not_specialize=["B", "I", "batch_tiles"])
def couplings_kernel(
    p_u, p_w, p_total, p_c, B, I, batch_tiles,
    J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, DB: tl.constexpr,
    KB: tl.constexpr, LEAKY: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """c [B, I, J] of a tile of samples and C input capsules."""
    pid = tl.program_id(0)
    row = (pid % batch_tiles).to(tl.int64) * R + tl.arange(0, R)
    m_row = row < B
    i = (pid // batch_tiles) * C + tl.arange(0, C)
    b_u = load_inputs(p_u, row, m_row, i, tl.arange(0, KB), I, K)
    top, factor, _ = softmax_over_outputs(
        p_u, p_w, p_total, p_total, row, m_row, i, b_u, I, J, D, K, R, C, DB, KB, LEAKY, False, UNIT
    )
    p_bi = p_c + (row * I)[:, None] * J + (i * J)[None, :]
    m_bi = m_row[:, None] & (i < I)[None, :]
    for j in range(J):
        logit = agreement(p_total, p_w, p_u, b_u, row, m_row, i, j, I, J, D, K, R, C, DB, KB, UNIT)
        c = power(logit - top) * factor
        tl.store(p_bi + j, c.to(p_c.dtype.element_ty), mask=m_bi)


def couplings(
    u: Tensor, weight: Tensor, bias: Tensor | None, logits: None, mask: None, iterations: int, leaky: bool
) -> Tensor:
    with on_device(u):
        c = torch.empty(*u.shape[:2], weight.shape[1], dtype=u.dtype, device=u.device)
        if iterations <= 1:
            return c.fill_(1 / (weight.shape[1] + leaky) if iterations else 1)
        layer = Layer(u, weight, leaky)
        _, _, total = layer.forward(bias, iterations, iterations - 1)
        tile = layer.routed_tile(launch_configs.ROUTED)
        batch_tiles = ceil_div(layer.B, tile.rows)
        launch(
            couplings_kernel, batch_tiles * ceil_div(layer.I, tile.inputs), u, weight, total, c, layer.B,
            layer.I, batch_tiles, **layer.routed_options(tile),
        )  # fmt: skip
    return c
