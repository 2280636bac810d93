"""Predictions û_ij = W_ij u_i and their gradients: for each input capsule a plain product.

û_i [B, J · D] = u_i W_iᵀ, ∂u_i = ∂û_i W_i, ∂W_i = ∂û_iᵀ u_i, with W_i [J · D, K].
"""

import triton
import triton.language as tl
from torch import Tensor

from capsops.backends.triton import launch_configs, reductions
from capsops.backends.triton.capsules import product
from capsops.backends.triton.launch import launch, on_device, unit
from capsops.backends.triton.launch_configs import ceil_div


@triton.jit(do_not_specialize=["B", "I", "batch_tiles", "columns"])
def predictions_kernel(
    p_u, p_w, p_u_hat, B, I, batch_tiles, columns,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, KB: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """û of one i, a tile of samples and C of the N = J · D columns."""
    pid = tl.program_id(0).to(tl.int64)
    row = (pid % batch_tiles) * R + tl.arange(0, R)
    n = ((pid // batch_tiles) % columns).to(tl.int32) * C + tl.arange(0, C)
    i = pid // batch_tiles // columns
    m_row, m_n = (row < B)[:, None], (n < N)
    k = tl.arange(0, KB)
    p_u = p_u + (row * I + i)[:, None] * K
    p_w = p_w + i * (N * K) + (n * K)[None, :]
    b_u_hat = tl.zeros([R, C], tl.float32)
    for first in range(0, K, KB):
        m_k = first + k < K
        b_u = tl.load(p_u + (first + k)[None, :], mask=m_row & m_k[None, :], other=0.0)
        b_w = tl.load(p_w + (first + k)[:, None], mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_u_hat += product(b_u, b_w, UNIT)
    p_u_hat = p_u_hat + (row * I + i)[:, None] * N + n[None, :]
    tl.store(p_u_hat, b_u_hat.to(p_u_hat.dtype.element_ty), mask=m_row & m_n[None, :])


@triton.jit(do_not_specialize=["B", "I", "batch_tiles", "columns"])
def predictions_gradient_u_kernel(
    p_grad, p_w, p_grad_u, B, I, batch_tiles, columns,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, KB: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """∂u of one i, a tile of samples and KB of its components: a sum over all N columns."""
    pid = tl.program_id(0).to(tl.int64)
    row = (pid % batch_tiles) * R + tl.arange(0, R)
    k = ((pid // batch_tiles) % columns).to(tl.int32) * KB + tl.arange(0, KB)
    i = pid // batch_tiles // columns
    m_row, m_k = (row < B)[:, None], (k < K)[None, :]
    n = tl.arange(0, C)
    p_grad = p_grad + (row * I + i)[:, None] * N
    p_w = p_w + i * (N * K) + k[None, :]
    b_grad_u = tl.zeros([R, KB], tl.float32)
    for first in range(0, N, C):
        m_n = first + n < N
        b_g = tl.load(p_grad + (first + n)[None, :], mask=m_row & m_n[None, :], other=0.0)
        b_w = tl.load(p_w + ((first + n) * K)[:, None], mask=m_n[:, None] & m_k, other=0.0)
        b_grad_u += product(b_g, b_w, UNIT)
    tl.store(
        p_grad_u + (row * I + i)[:, None] * K + k[None, :],
        b_grad_u.to(p_grad_u.dtype.element_ty),
        mask=m_row & m_k,
    )


@triton.jit(do_not_specialize=["B", "I", "columns", "size"])
def predictions_gradient_w_kernel(
    p_grad, p_u, p_grad_w, B, I, columns, size,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, KB: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """∂W of one i, C of the N columns and KB components: a sum over `size` samples."""
    pid = tl.program_id(0).to(tl.int64)
    depths = tl.cdiv(K, KB)
    k = (pid % depths).to(tl.int32) * KB + tl.arange(0, KB)
    pid = pid // depths
    n = (pid % columns).to(tl.int32) * C + tl.arange(0, C)
    i = (pid // columns) % I
    part = pid // columns // I
    m_n, m_k = n < N, k < K
    first = part * size
    last = tl.minimum(first + size, B)
    b_grad_w = tl.zeros([C, KB], tl.float32)
    for begin in range(first, last, R):
        row = begin + tl.arange(0, R)
        m_row = (row < last)[:, None]
        b_g = tl.load(p_grad + (row * I + i)[:, None] * N + n[None, :], mask=m_row & m_n[None, :], other=0.0)
        b_u = tl.load(p_u + (row * I + i)[:, None] * K + k[None, :], mask=m_row & m_k[None, :], other=0.0)
        b_grad_w += product(tl.trans(b_g), b_u, UNIT)
    p_grad_w = p_grad_w + (part * I + i) * (N * K) + (n * K)[:, None] + k[None, :]
    tl.store(p_grad_w, b_grad_w.to(p_grad_w.dtype.element_ty), mask=m_n[:, None] & m_k[None, :])


def predictions(u: Tensor, weight: Tensor) -> Tensor:
    (B, I, K), (_, J, D, _) = u.shape, weight.shape
    with on_device(u):
        u_hat = u.new_empty(B, I, J, D)
        tile = launch_configs.predictions(B, J * D, K)
        batch_tiles, columns = ceil_div(B, tile.rows), ceil_div(J * D, tile.columns)
        launch(
            predictions_kernel, batch_tiles * columns * I, u, weight, u_hat, B, I, batch_tiles, columns,
            N=J * D, K=K, **tile.options(), UNIT=unit(u),
        )  # fmt: skip
    return u_hat


def predictions_backward(
    grad: Tensor, u: Tensor, weight: Tensor, needs_u: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    (B, I, K), (_, J, D, _) = u.shape, weight.shape
    tile = launch_configs.predictions(B, J * D, K)
    options = {"N": J * D, "K": K, **tile.options(), "UNIT": unit(u)}
    with on_device(u):
        grad_u, grad_weight = u.new_empty(u.shape if needs_u else 0), u.new_empty(0)
        if needs_u:
            batch_tiles, columns = ceil_div(B, tile.rows), ceil_div(K, tile.depth)
            launch(
                predictions_gradient_u_kernel, batch_tiles * columns * I, grad, weight, grad_u, B, I,
                batch_tiles, columns, **options,
            )  # fmt: skip
        if needs_weight:
            columns, depths = ceil_div(J * D, tile.columns), ceil_div(K, tile.depth)
            parts = launch_configs.split(B, columns * depths * I, u, tile.resident, tile.rows, waves=1)
            partials = reductions.partial_results(weight, parts.number)
            launch(
                predictions_gradient_w_kernel, columns * depths * I * parts.number, grad, u, partials, B, I,
                columns, parts.size, **options,
            )  # fmt: skip
            grad_weight = reductions.added(partials, weight.dtype)
    return grad_u, grad_weight
