"""squash and its gradient, of the rows of a block, and of vectors of any length along any dimension.

squash(s) = s · r / (1 + r²) with r = ‖s‖; beyond r = 1 as s/r · 1 / (1 + 1/r²), r from a scaled sum, so that
no finite s overflows. Its vector-Jacobian product is f g + r f′ (n · g) n with n = s/r, f = r / (1 + r²);
r f′ changes its sign under r → 1/r.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from capsops.backends.triton.launch import launch, on_device
from capsops.backends.triton.launch_configs import ceil_div, power_of_2

_LONGEST = 1024  # numbers of one vector that a program has in registers
_NUMBERS = 2048  # numbers that a program has in registers


@triton.jit
def _widen(top, square, dot, b_s, b_g):
    """Adds a tile to the statistics: the largest |s| so far, Σ (s / top)² and Σ (s / top) g."""
    new = tl.maximum(top, tl.max(tl.abs(b_s), 1))
    safe = tl.where(new > 0, new, 1.0)
    b_x = b_s / safe[:, None]
    shrink = top / safe
    square = square * (shrink * shrink) + tl.sum(b_x * b_x, 1)
    dot = dot * shrink + tl.sum(b_x * b_g, 1)
    return new, square, dot


@triton.jit
def _apply(b_s, top, square):
    """squash(s) from the statistics of its vectors."""
    safe = tl.where(top > 0, top, 1.0)
    length = tl.sqrt_rn(square)
    r = safe * length
    small = tl.where(r > 1, 1.0, r)
    large = tl.where(r > 1, r, 1.0)
    inside = small / (1 + small * small)
    outside = 1 / (length * (1 + 1 / large / large))
    return tl.where((r > 1)[:, None], (b_s / safe[:, None]) * outside[:, None], b_s * inside[:, None])


@triton.jit
def _apply_vjp(b_g, b_s, top, square, dot):
    safe = tl.where(top > 0, top, 1.0)
    length = tl.sqrt_rn(square)
    r = safe * length
    length = tl.where(length == 0, 1.0, length)
    small = tl.where(r > 1, 1.0, r)
    large = tl.where(r > 1, r, 1.0)
    f = tl.where(r > 1, 1 / (large + 1 / large), small / (1 + small * small))
    q = tl.where(r > 1, 1 / large, small)
    slope = q * (1 - q * q) / ((1 + q * q) * (1 + q * q))
    slope = tl.where(r > 1, -slope, slope)
    return f[:, None] * b_g + (slope * (dot / length))[:, None] * (b_s / safe[:, None] / length[:, None])


@triton.jit
def squash_rows(b_s):
    """squash of each row [R, DP]."""
    zero = tl.zeros([b_s.shape[0]], tl.float32)
    top, square, _ = _widen(zero, zero, zero, b_s, b_s)
    return _apply(b_s, top, square)


@triton.jit
def squash_rows_vjp(b_g, b_s):
    """The gradient of s [R, DP] from that of squash(s)."""
    zero = tl.zeros([b_s.shape[0]], tl.float32)
    top, square, dot = _widen(zero, zero, zero, b_s, b_g)
    return _apply_vjp(b_g, b_s, top, square, dot)


@triton.jit(do_not_specialize=["rows", "tiles"])
def squash_kernel(
    p_s, p_g, p_out, rows, tiles, size, LAST: tl.constexpr, GRADIENT: tl.constexpr, WHOLE: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Vectors of `size` numbers. LAST: one after another; else interleaved, `rows` vectors in a group."""
    pid = tl.program_id(0).to(tl.int64)
    row = (pid % tiles) * R + tl.arange(0, R)
    m_row = (row < rows)[:, None]
    n = tl.arange(0, N)
    if LAST:
        offset = row[:, None] * size
        step = 1
    else:
        offset = (pid // tiles) * size * rows + row[:, None]
        step = rows
    top = tl.zeros([R], tl.float32)
    square = tl.zeros([R], tl.float32)
    dot = tl.zeros([R], tl.float32)
    if WHOLE:
        at = offset + n.to(tl.int64)[None, :] * step
        mask = m_row & (n < size)[None, :]
        b_s = tl.load(p_s + at, mask=mask, other=0.0).to(tl.float32)
        if GRADIENT:
            b_g = tl.load(p_g + at, mask=mask, other=0.0).to(tl.float32)
            top, square, dot = _widen(top, square, dot, b_s, b_g)
            b_out = _apply_vjp(b_g, b_s, top, square, dot)
        else:
            top, square, dot = _widen(top, square, dot, b_s, b_s)
            b_out = _apply(b_s, top, square)
        tl.store(p_out + at, b_out.to(p_out.dtype.element_ty), mask=mask)
    else:
        for first in range(0, size, N):
            at = offset + (first + n).to(tl.int64)[None, :] * step
            mask = m_row & (first + n < size)[None, :]
            b_s = tl.load(p_s + at, mask=mask, other=0.0).to(tl.float32)
            b_g = b_s
            if GRADIENT:
                b_g = tl.load(p_g + at, mask=mask, other=0.0).to(tl.float32)
            top, square, dot = _widen(top, square, dot, b_s, b_g)
        for first in range(0, size, N):
            at = offset + (first + n).to(tl.int64)[None, :] * step
            mask = m_row & (first + n < size)[None, :]
            b_s = tl.load(p_s + at, mask=mask, other=0.0).to(tl.float32)
            if GRADIENT:
                b_g = tl.load(p_g + at, mask=mask, other=0.0).to(tl.float32)
                b_out = _apply_vjp(b_g, b_s, top, square, dot)
            else:
                b_out = _apply(b_s, top, square)
            tl.store(p_out + at, b_out.to(p_out.dtype.element_ty), mask=mask)


def _launch(s: Tensor, grad: Tensor | None, dim: int) -> Tensor:
    out = torch.empty_like(s)
    size = s.shape[dim]
    inner = s.shape[dim + 1 :].numel()
    outer = s.numel() // (size * inner)
    groups, rows = (1, outer) if inner == 1 else (outer, inner)
    N = power_of_2(min(size, _LONGEST))
    R = max(1, min(power_of_2(rows), _NUMBERS // N))
    tiles = ceil_div(rows, R)
    with on_device(s):
        launch(
            squash_kernel, groups * tiles, s, grad, out, rows, tiles, size,
            LAST=inner == 1, GRADIENT=grad is not None, WHOLE=size <= N, R=R, N=N, num_warps=4,
        )  # fmt: skip
    return out


def squash(s: Tensor, dim: int) -> Tensor:
    return _launch(s, None, dim)


def squash_backward(grad: Tensor, s: Tensor, dim: int) -> Tensor:
    return _launch(s, grad, dim)
