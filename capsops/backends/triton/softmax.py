"""The softmax over output capsules, which makes couplings of logits."""

import triton
import triton.language as tl

from capsops.backends.triton.capsules import agreement, power


@triton.jit
def softmax(logits, LEAKY: tl.constexpr):
    """c of logits of all j [C, JB]. LEAKY: one more, 0, takes part."""
    top = tl.max(logits, 1)
    if LEAKY:
        top = tl.maximum(top, 0.0)
    e = power(logits - top[:, None])
    z = tl.sum(e, 1)
    if LEAKY:
        z += power(-top)
    return e * (1.0 / z)[:, None]


@triton.jit
def softmax_over_outputs(
    p_u, p_w, p_total, p_grad_s, row, m_row, i, b_u, I,
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
        logit = agreement(p_total, p_w, p_u, b_u, row, m_row, i, j, I, J, D, K, R, C, DB, KB, UNIT)
        higher = tl.maximum(top, logit)
        shrink = tl.exp(top - higher)
        e = power(logit - higher)
        z = z * shrink + e
        if GRADIENT:
            a = agreement(p_grad_s, p_w, p_u, b_u, row, m_row, i, j, I, J, D, K, R, C, DB, KB, UNIT)
            mean = mean * shrink + e * a
        top = higher
    return top, 1.0 / z, mean / z
