"""What kernels of several ops share: blocks of capsules and of W in registers, products, a power.

Prefixes: b_ a block, p_ a pointer, m_ a mask. Sizes of blocks are powers of two: R rows (samples), C input
capsules, DB output components at a time, KP ≥ K components of an input capsule; what lies outside is 0.
"""

import triton
import triton.language as tl


@triton.jit
def product(b_x, b_y, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    """b_x @ b_y summed in float32. WIDE: operands in float32; the interpreter has no 16-bit products."""
    if WIDE:
        b_x = b_x.to(tl.float32)
        b_y = b_y.to(tl.float32)
    return tl.dot(b_x, b_y, input_precision=PRECISION)


@triton.jit
def load_inputs(
    p_u, row, m_row, i, I, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, KP: tl.constexpr
):  # fmt: skip
    """u of the rows and input capsules `i`: [R, KP, C].

    With i the last axis, a thread of a matrix unit's result holds all k of one i: sums over k stay in it.
    """
    k = tl.arange(0, KP)
    mask = m_row[:, None, None] & (i < I)[None, :, None] & (k < K)[None, None, :]
    p = p_u + (row * I * K)[:, None, None] + (i * K)[None, :, None] + k[None, None, :]
    return tl.permute(tl.load(p, mask=mask, other=0.0), (0, 2, 1))


@triton.jit
def store_inputs(p_u, b_u, row, m_row, i, I, K: tl.constexpr, KP: tl.constexpr):
    k = tl.arange(0, KP)
    mask = m_row[:, None, None] & (i < I)[None, :, None] & (k < K)[None, None, :]
    p = p_u + (row * I * K)[:, None, None] + (i * K)[None, :, None] + k[None, None, :]
    tl.store(p, tl.permute(b_u, (0, 2, 1)).to(p_u.dtype.element_ty), mask=mask)


@triton.jit
def load_outputs(p_x, p_like, row, m_row, j, d, J: tl.constexpr, D: tl.constexpr):
    """Components d of output capsule j of the rows, from [B, J, D], rounded to the dtype of p_like."""
    mask = m_row[:, None] & (d < D)[None, :]
    b_x = tl.load(p_x + (row * (J * D) + j * D)[:, None] + d[None, :], mask=mask, other=0.0)
    return b_x.to(p_like.dtype.element_ty)


@triton.jit
def weight_offsets(i, j, d, J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    """Where W_ij [d, k] stands, for blocks of i and d: [C, DB, KP]."""
    k = tl.arange(0, KP)
    i = i.to(tl.int64) * (J * D * K) + j * (D * K)
    return i[:, None, None] + (d * K)[None, :, None] + k[None, None, :]


@triton.jit
def weight_mask(i, d, I, D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    k = tl.arange(0, KP)
    return (i < I)[:, None, None] & (d < D)[None, :, None] & (k < K)[None, None, :]


@triton.jit
def load_weights(
    p_w, i, j, d, I, J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, C: tl.constexpr, DB: tl.constexpr,
    KP: tl.constexpr,
):  # fmt: skip
    """W_ij of a block of i and components d: [DB, KP · C].

    Adding 0 keeps Triton from turning the block round in shared memory, where its compiler for sm_90 stops
    with "Illegal shared layout" when C is below 8 (seen in 3.7.1).
    """
    p = p_w + weight_offsets(i, j, d, J, D, K, KP)
    b_w = tl.load(p, mask=weight_mask(i, d, I, D, K, KP), other=0.0)
    return tl.reshape(tl.permute(b_w, (1, 2, 0)), [DB, KP * C]) + 0.0


@triton.jit
def project(
    p_x, p_w, row, m_row, i, j, I, J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, DB: tl.constexpr, KP: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """W_ijᵀ x_j [R, KP, C] for x [B, J, D]: with V its product with u is the logit û · V."""
    d = tl.arange(0, DB)
    b_x = load_outputs(p_x, p_w, row, m_row, j, d, J, D)
    b_w = load_weights(p_w, i, j, d, I, J, D, K, C, DB, KP)
    found = product(b_x, b_w, PRECISION, WIDE)
    for first in range(DB, D, DB):
        b_x = load_outputs(p_x, p_w, row, m_row, j, first + d, J, D)
        b_w = load_weights(p_w, i, j, first + d, I, J, D, K, C, DB, KP)
        found += product(b_x, b_w, PRECISION, WIDE)
    return tl.reshape(found, [R, KP, C])


@triton.jit
def power(z):
    """eᶻ for z ≤ 0, 0 where that is no normal float32 number, on every device."""
    return tl.where(z < -87.0, 0.0, tl.exp(z))
