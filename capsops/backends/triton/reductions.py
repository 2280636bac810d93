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


@triton.jit(do_not_specialize=["rows", "splits", "t", "last"])
def finish_reduction_kernel(
    p_partials, p_s, p_total, p_grad_total, p_grad_s, rows, splits, t, last,
    D: tl.constexpr, SQUASH: tl.constexpr, R: tl.constexpr, DP: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """∂s of pass t, squash-vjp(s, ∂v). In the last, ∂v is Σ partials, and V of all passes before is made too.

    In those before ∂v is ∂V = ∂V of the pass after + Σ partials, the former 0 for the one before the last.
    Without SQUASH v of the last pass is s, and ∂s is ∂v.
    """
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    d = tl.arange(0, DP)
    at = row[:, None] * D + d[None, :]
    mask = (row < rows)[:, None] & (d < D)[None, :]
    size = rows.to(tl.int64) * D
    b_total = tl.zeros([R, DP], tl.float32)
    for earlier in range(tl.where(t == last, last, 0)):
        b_total += squash_rows(tl.load(p_s + earlier * size + at, mask=mask, other=0.0))
        tl.store(p_total + earlier * size + at, b_total, mask=mask)
    b_grad = _add_partials(p_partials, splits, size, at, mask, R, DP, AT_ONCE)
    b_grad += load_if(t + 1 < last, p_grad_total + at, mask)
    tl.store(p_grad_total + at, b_grad, mask=tl.where(t < last, mask, False))
    b_grad_s = squash_rows_vjp(b_grad, tl.load(p_s + t * size + at, mask=mask, other=0.0))
    if not SQUASH:
        b_grad_s = tl.where(t == last, b_grad, b_grad_s)
    tl.store(p_grad_s + t * size + at, b_grad_s, mask=mask)


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


class Backward:
    """∂s of all passes [T, B, J, D], made from the last pass down, and Vᵗ of all passes but the last."""

    def __init__(self, grad: Tensor, s: Tensor, squash_output: bool) -> None:
        """Makes ∂s of the last pass, from ∂v."""
        self.s, self.squash_output = s, squash_output
        self.last = len(s) - 1
        self.total = s.new_empty(max(self.last, 1), *s.shape[1:])
        self.grad_s = torch.empty_like(s)
        self._grad_total = s.new_empty(s.shape[1:])
        self._finish(grad.unsqueeze(0).to(s.dtype), self.last)

    def _finish(self, partials: Tensor, t: int) -> None:
        _, B, J, D = self.s.shape
        R, DP = _row_tile(D)
        launch(
            finish_reduction_kernel, ceil_div(B * J, R), partials, self.s, self.total, self._grad_total,
            self.grad_s, B * J, partials.shape[0], t, self.last, D=D, SQUASH=self.squash_output, R=R, DP=DP,
            AT_ONCE=_AT_ONCE, num_warps=4,
        )  # fmt: skip

    def reduce(self, routed_pass: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        """Makes ∂s of the passes before the last.

        `routed_pass` makes the partial sums of ∂b û over i, from V, ∂s and the number of the pass less one.
        """
        for t in range(self.last, 0, -1):
            self._finish(routed_pass(self.total[t - 1], self.grad_s[t], t - 1), t - 1)


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
