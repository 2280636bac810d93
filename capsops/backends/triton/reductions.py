"""The reductions between two passes: partial sums are added in a fixed order, squashed, and added to V.

Rows are pairs (b, j) of D numbers each: B × J × D numbers in all, few compared with a pass.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from capsops.backends.triton.capsules import load_if
from capsops.backends.triton.launch import launch
from capsops.backends.triton.launch_configs import ceil_div, power_of_2
from capsops.backends.triton.squash import squash_rows, squash_rows_vjp

_NUMBERS = 128  # numbers of s that a program makes
_AT_ONCE = 32  # partial sums whose loads are in flight together


@triton.jit
def _add_partials(
    p_partials, splits, size, at, mask, R: tl.constexpr, DP: tl.constexpr, AT_ONCE: tl.constexpr
):
    """Σ over the splits of [splits, size] at `at` [R, DP], in order of blocks of AT_ONCE."""
    b_sum = tl.zeros([R, DP], tl.float32)
    split = tl.arange(0, AT_ONCE)
    for first in range(0, splits, AT_ONCE):
        n = first + split
        p = p_partials + n.to(tl.int64)[:, None, None] * size + at[None, :, :]
        b_sum += tl.sum(tl.load(p, mask=(n < splits)[:, None, None] & mask[None, :, :], other=0.0), 0)
    return b_sum


@triton.jit(do_not_specialize=["rows", "splits", "t", "last"])
def finish_pass_kernel(
    p_partials, p_bias, p_s, p_total, p_v, rows, splits, count, t, last,
    J: tl.constexpr, D: tl.constexpr, SQUASH: tl.constexpr, R: tl.constexpr, DP: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """s = Σ partials / count + β of pass t; v = squash(s); V += v, or, in the last pass, v is the result.

    Without SQUASH the result is s itself.
    """
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    d = tl.arange(0, DP)
    at = row[:, None] * D + d[None, :]
    mask = (row < rows)[:, None] & (d < D)[None, :]
    b_s = _add_partials(p_partials, splits, rows.to(tl.int64) * D, at, mask, R, DP, AT_ONCE) / count
    if p_bias is not None:
        b_s += tl.load(p_bias + (row % J)[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(p_s + at, b_s, mask=mask)
    b_v = squash_rows(b_s)
    b_result = b_v if SQUASH else b_s
    tl.store(p_v + at, b_result.to(p_v.dtype.element_ty), mask=tl.where(t == last, mask, False))
    b_v += load_if(t > 0, p_total + at, mask)
    tl.store(p_total + at, b_v, mask=tl.where(t < last, mask, False))


@triton.jit(do_not_specialize=["rows", "passes"])
def prepare_backward_kernel(
    p_grad, p_s, p_total, p_grad_s, rows, passes,
    D: tl.constexpr, SQUASH: tl.constexpr, R: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Vᵗ = Σ squash(s) of all passes but the last, and ∂s of the last, squash-vjp(s, ∂v).

    Without SQUASH v of the last pass is s, and ∂s is ∂v.
    """
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    d = tl.arange(0, DP)
    at = row[:, None] * D + d[None, :]
    mask = (row < rows)[:, None] & (d < D)[None, :]
    size = rows.to(tl.int64) * D
    b_total = tl.zeros([R, DP], tl.float32)
    for t in range(passes - 1):
        b_total += squash_rows(tl.load(p_s + t * size + at, mask=mask, other=0.0))
        tl.store(p_total + t * size + at, b_total, mask=mask)
    last = (passes - 1) * size
    b_grad = tl.load(p_grad + at, mask=mask, other=0.0).to(tl.float32)
    if SQUASH:
        b_s = tl.load(p_s + last + at, mask=mask, other=0.0)
        tl.store(p_grad_s + last + at, squash_rows_vjp(b_grad, b_s), mask=mask)
    else:
        tl.store(p_grad_s + last + at, b_grad, mask=mask)


@triton.jit(do_not_specialize=["rows", "splits", "t", "last"])
def finish_reduction_kernel(
    p_partials, p_s, p_grad_total, p_grad_s, rows, splits, t, last,
    D: tl.constexpr, R: tl.constexpr, DP: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """∂Vᵗ⁻¹ = ∂Vᵗ + Σ partials, which is ∂vᵗ⁻¹ also; ∂sᵗ⁻¹ = squash-vjp(sᵗ⁻¹, ∂vᵗ⁻¹). ∂V of the last is 0."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    d = tl.arange(0, DP)
    at = row[:, None] * D + d[None, :]
    mask = (row < rows)[:, None] & (d < D)[None, :]
    b_grad = _add_partials(p_partials, splits, rows.to(tl.int64) * D, at, mask, R, DP, AT_ONCE)
    b_grad += load_if(t < last, p_grad_total + at, mask)
    tl.store(p_grad_total + at, b_grad, mask=mask)
    b_s = tl.load(p_s + at, mask=mask, other=0.0)
    tl.store(p_grad_s + at, squash_rows_vjp(b_grad, b_s), mask=mask)


def _row_tile(D: int) -> tuple[int, int]:
    DP = power_of_2(D)
    return max(1, _NUMBERS // DP), DP


def finish_pass(
    partials: Tensor, bias: Tensor | None, s: Tensor, total: Tensor, v: Tensor, count: int, t: int, last: int,
    squash_output: bool,
) -> None:  # fmt: skip
    """partials [splits, B, J, D] → s of pass t [B, J, D]; V (`total`) or, in the last pass, v."""
    B, J, D = v.shape
    R, DP = _row_tile(D)
    launch(
        finish_pass_kernel, ceil_div(B * J, R), partials, bias, s, total, v, B * J, partials.shape[0],
        float(count), t, last, J=J, D=D, SQUASH=squash_output, R=R, DP=DP, AT_ONCE=_AT_ONCE, num_warps=4,
    )  # fmt: skip


def prepare_backward(grad: Tensor, s: Tensor, squash_output: bool) -> tuple[Tensor, Tensor]:
    """Vᵗ of all passes but the last [T − 1, B, J, D], and ∂s [T, B, J, D] of which the last is filled."""
    passes, B, J, D = s.shape
    R, DP = _row_tile(D)
    total = s.new_empty(max(passes - 1, 1), B, J, D)
    grad_s = torch.empty_like(s)
    launch(
        prepare_backward_kernel, ceil_div(B * J, R), grad, s, total, grad_s, B * J, passes, D=D,
        SQUASH=squash_output, R=R, DP=DP, num_warps=1,
    )  # fmt: skip
    return total, grad_s


def finish_reduction(
    partials: Tensor, s: Tensor, grad_total: Tensor, grad_s: Tensor, t: int, last: int
) -> None:
    """partials [splits, B, J, D] of ∂V of pass t, s of the pass before → ∂V, kept in place, and its ∂s."""
    B, J, D = s.shape
    R, DP = _row_tile(D)
    launch(
        finish_reduction_kernel, ceil_div(B * J, R), partials, s, grad_total, grad_s, B * J,
        partials.shape[0], t, last, D=D, R=R, DP=DP, AT_ONCE=_AT_ONCE, num_warps=4,
    )  # fmt: skip


def reduce_backward(
    routed_pass: Callable[[Tensor, Tensor, int], Tensor], total: Tensor, grad_s: Tensor, s: Tensor
) -> None:
    """∂s of all passes before the last, from the last down.

    `routed_pass` makes the partial sums of ∂b û over i, from V, ∂s and the number of the pass less one.
    """
    grad_total = s.new_empty(s.shape[1:])
    last = len(s) - 1
    for t in range(last, 0, -1):
        partials = routed_pass(total[t - 1], grad_s[t], t - 1)
        finish_reduction(partials, s[t - 1], grad_total, grad_s[t - 1], t, last)


def partial_results(like: Tensor, count: int, wide: bool = False) -> Tensor:
    """A buffer for `count` partial results of the shape of `like`: in float32, or one in the dtype of `like`.

    One has to be float32 too for a kernel that adds to it (`wide`). `added` makes the result.
    """
    dtype = like.dtype if count == 1 and not wide else torch.float32
    return like.new_empty(count, *like.shape, dtype=dtype)


def added(partials: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Σ over the first axis; empty where there is no part.

    torch's sums have a fixed order. A kernel of ours would be compiled again for each number of parts.
    """
    if len(partials) == 0:
        return partials.new_empty(0, dtype=dtype)
    return (partials[0] if len(partials) == 1 else partials.sum(0)).to(dtype)


def bias_gradient(grad_s: Tensor, like: Tensor) -> Tensor:
    """∂β [J, D] in the dtype of `like`: Σ over passes and samples of ∂s [passes, B, J, D]."""
    return added(grad_s.flatten(0, 1), like.dtype)
