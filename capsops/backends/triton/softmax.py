"""The softmax over output capsules, which makes couplings of logits.

Starting logits of −∞ close pairs, whose couplings are 0; they are 0 also where all pairs of an input capsule
are closed, and the largest logit is −∞.
"""

import triton
import triton.language as tl

from capsops.backends.triton.capsules import agreement, power
from capsops.backends.triton.pairs import load_pairs


@triton.jit
def finite_or_0(x):
    """x, and 0 where it is −∞."""
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def open_pairs(logits):
    """The couplings without routing: 1, and 0 where a pair is closed."""
    return tl.where(logits == -float("inf"), 0.0, 1.0)


@triton.jit
def softmax(logits, LEAKY: tl.constexpr, CLOSABLE: tl.constexpr):
    """c of logits of all j [C, JB]. LEAKY: one more, 0, takes part. CLOSABLE: all of them may be −∞."""
    top = tl.max(logits, 1)
    if LEAKY:
        top = tl.maximum(top, 0.0)
    if CLOSABLE:
        top = finite_or_0(top)
    e = power(logits - top[:, None])
    z = tl.sum(e, 1)
    if LEAKY:
        z += power(-top)
    if CLOSABLE:
        z = tl.where(z == 0, 1.0, z)
    return e * (1.0 / z)[:, None]


@triton.jit
def pair_logits(
    p_total, p_w, p_u, p_mask, starting, b_u, row, m_row, i, j, I,
    J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, DB: tl.constexpr,
    KB: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """ℓ + û · V [R, C] of one output capsule; without V ℓ, without ℓ û · V."""
    if p_total is None:
        b = tl.zeros([R, C], tl.float32)
    else:
        b = agreement(p_total, p_w, p_u, p_mask, b_u, row, m_row, i, j, I, J, D, K, R, C, DB, KB, UNIT)
    if starting is not None:
        b += load_pairs(starting, row[:, None], m_row[:, None], i[None, :], (i < I)[None, :], j, None)
    return b


@triton.jit
def softmax_over_outputs(
    p_u, p_mask, p_w, p_total, p_grad_s, starting, row, m_row, i, b_u, I,
    J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, DB: tl.constexpr,
    KB: tl.constexpr, LEAKY: tl.constexpr, GRADIENT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Of each (b, i): the largest logit, 1 / Σ_j exp(b − largest) and, with GRADIENT, Σ_j c a; all [R, C]."""
    top = tl.full([R, C], -float("inf"), tl.float32)
    z = tl.zeros([R, C], tl.float32)
    mean = tl.zeros([R, C], tl.float32)
    if LEAKY:
        top = tl.zeros([R, C], tl.float32)
        z = tl.full([R, C], 1.0, tl.float32)
    for j in range(J):
        logit = pair_logits(
            p_total, p_w, p_u, p_mask, starting, b_u, row, m_row, i, j, I, J, D, K, R, C, DB, KB, UNIT
        )
        higher = tl.maximum(top, logit)
        base = higher
        if starting is not None:
            base = finite_or_0(higher)
        shrink = tl.exp(top - base)
        e = power(logit - base)
        z = z * shrink + e
        if GRADIENT:
            a = agreement(p_grad_s, p_w, p_u, p_mask, b_u, row, m_row, i, j, I, J, D, K, R, C, DB, KB, UNIT)
            mean = mean * shrink + e * a
        top = higher
    if starting is not None:
        top = finite_or_0(top)
        z = tl.where(z == 0, 1.0, z)
    return top, 1.0 / z, mean / z
