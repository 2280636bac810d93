"""Device functions that several kernels share: blocks of capsules and of W, products, the exponential.

Prefixes: b_ a block, p_ a pointer, m_ a mask. Sizes of blocks are powers of two: R rows (samples), C input
capsules, DB components of an output capsule and KB of an input capsule; beyond a tensor's end they are 0.
"""

import triton
import triton.language as tl

from capsops.backends.triton.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def to_tf32(b_x):
    """Float32 rounded to the nearest number of 10 bits behind the point, ties away from 0.

    Matrix units truncate the other 13 bits, which doubles the largest error and gives all errors one sign.
    The addition to the bits carries into the exponent as it should, up to infinity, but it would turn some
    NaN into zeros, and the truncation would turn others into infinities: hence the separate case for NaN.
    """
    bits = (b_x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(b_x == b_x, bits.to(tl.float32, bitcast=True), float("nan"))


@triton.jit
def product(b_x, b_y, UNIT: tl.constexpr):
    """b_x @ b_y summed in float32, the operands rounded as UNIT (see launch.unit) takes them."""
    if UNIT == "tf32":  # which represents float16 exactly
        if b_x.dtype == tl.float32:
            b_x = to_tf32(b_x)
        if b_y.dtype == tl.float32:
            b_y = to_tf32(b_y)
    if UNIT == "bf16":
        b_x = b_x.to(tl.bfloat16)
        b_y = b_y.to(tl.bfloat16)
    if _INTERPRETED or UNIT != "bf16":  # the interpreter has no 16-bit products
        b_x = b_x.to(tl.float32)
        b_y = b_y.to(tl.float32)
    return tl.dot(b_x, b_y, input_precision="tf32" if UNIT == "tf32" else "ieee")


@triton.jit
def load_if(condition, p, mask):
    """Loads from p where `condition`, a comparison of two numbers, and the mask are true; else 0.

    `mask & condition` is the same to the compiler, but the interpreter makes integers of it, which Triton 3.9
    does not accept as a mask.
    """
    return tl.load(p, mask=tl.where(condition, mask, False), other=0.0)


@triton.jit
def load_mask(p_mask, row, m_row, i, I):
    """Whether input capsules `i` of the rows are there: [R, C]."""
    p = p_mask + (row * I)[:, None] + i[None, :]
    return tl.load(p, mask=m_row[:, None] & (i < I)[None, :], other=0) != 0


@triton.jit
def present(p_mask, b, i, m_i, I):
    """m_i, but False for absent input capsules of sample b."""
    if p_mask is not None:
        m_i = m_i & (tl.load(p_mask + b * I + i, mask=m_i, other=0) != 0)
    return m_i


@triton.jit
def load_inputs(p_u, p_mask, row, m_row, i, k, I, K: tl.constexpr):
    """Components k of u of the rows and input capsules `i`, in float32: [R, KB, C].

    With i the last axis, a thread has all k of one i in the result of a matrix product: sums over k need no
    other thread. u of an absent input capsule is read as 0.
    """
    mask = m_row[:, None, None] & (i < I)[None, :, None] & (k < K)[None, None, :]
    if p_mask is not None:
        mask = mask & load_mask(p_mask, row, m_row, i, I)[:, :, None]
    p = p_u + (row * I * K)[:, None, None] + (i * K)[None, :, None] + k[None, None, :]
    return tl.permute(tl.load(p, mask=mask, other=0.0), (0, 2, 1)).to(tl.float32)


@triton.jit
def store_inputs(p_u, p_mask, b_u, row, m_row, i, k, I, K: tl.constexpr):
    """Stores components k of the rows and input capsules `i`; 0 for an absent one."""
    if p_mask is not None:
        b_u = tl.where(load_mask(p_mask, row, m_row, i, I)[:, None, :], b_u, 0.0)
    mask = m_row[:, None, None] & (i < I)[None, :, None] & (k < K)[None, None, :]
    p = p_u + (row * I * K)[:, None, None] + (i * K)[None, :, None] + k[None, None, :]
    tl.store(p, tl.permute(b_u, (0, 2, 1)).to(p_u.dtype.element_ty), mask=mask)


@triton.jit
def load_outputs(p_x, row, m_row, j, d, J: tl.constexpr, D: tl.constexpr):
    """Components d of output capsule j of the rows, from [B, J, D]."""
    mask = m_row[:, None] & (d < D)[None, :]
    return tl.load(p_x + (row * (J * D) + j * D)[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def weight_offsets(i, j, d, k, J: tl.constexpr, D: tl.constexpr, K: tl.constexpr):
    """The offset of W_ij [d, k], for blocks of i, d and k: [C, DB, KB]."""
    i = i.to(tl.int64) * (J * D * K) + j * (D * K)
    return i[:, None, None] + (d * K)[None, :, None] + k[None, None, :]


@triton.jit
def weight_mask(i, d, k, I, D: tl.constexpr, K: tl.constexpr):
    return (i < I)[:, None, None] & (d < D)[None, :, None] & (k < K)[None, None, :]


@triton.jit
def load_weights(
    p_w, i, j, d, k, I, J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, C: tl.constexpr, DB: tl.constexpr,
    KB: tl.constexpr,
):  # fmt: skip
    """W_ij of blocks of i, d and k: [DB, KB · C].

    Adding 0 keeps Triton from transposing the block in shared memory, where its compiler for sm_90 stops with
    "Illegal shared layout" when C is below 8 (seen in 3.7.1).
    """
    p = p_w + weight_offsets(i, j, d, k, J, D, K)
    b_w = tl.load(p, mask=weight_mask(i, d, k, I, D, K), other=0.0)
    return tl.reshape(tl.permute(b_w, (1, 2, 0)), [DB, KB * C]) + 0.0


@triton.jit
def project(
    p_x, p_w, row, m_row, i, j, k, I, J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, DB: tl.constexpr, KB: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Components k of W_ijᵀ x_j [R, KB, C] for x [B, J, D]."""
    b_p = tl.zeros([R, KB * C], tl.float32)
    for first in range(0, D, DB):
        d = first + tl.arange(0, DB)
        b_x = load_outputs(p_x, row, m_row, j, d, J, D)
        b_p += product(b_x, load_weights(p_w, i, j, d, k, I, J, D, K, C, DB, KB), UNIT)
    return tl.reshape(b_p, [R, KB, C])


@triton.jit
def agreement(
    p_x, p_w, p_u, p_mask, b_u, row, m_row, i, j, I, J: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, DB: tl.constexpr, KB: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """û · x [R, C] for x [B, J, D]: u · (W_ijᵀ x_j); b_u is all of u where K ≤ KB."""
    b_logits = tl.zeros([R, C], tl.float32)
    for first in range(0, K, KB):
        k = first + tl.arange(0, KB)
        if K > KB:
            b_u = load_inputs(p_u, p_mask, row, m_row, i, k, I, K)
        b_p = project(p_x, p_w, row, m_row, i, j, k, I, J, D, K, R, C, DB, KB, UNIT)
        b_logits += tl.sum(b_p * b_u, 1)
    return b_logits


@triton.jit
def power(z):
    """eᶻ for z ≤ 0, and 0 where that would be a subnormal float32 number, on every device."""
    return tl.where(z < -87.0, 0.0, tl.exp(z))
