"""Comparisons with the reference; their messages name the tensor, its error and the error allowed."""

from collections.abc import Sequence

import torch
from torch import Tensor


def largest(x: Tensor) -> float:
    """The largest magnitude in x, 0 if x is empty."""
    return x.abs().max().item() if x.numel() else 0.0


def assert_like(got: Tensor, want: Tensor, name: str = "result") -> None:
    """Asserts that shape and dtype are the same."""
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, not {list(want.shape)}"
    assert got.dtype == want.dtype, f"{name}: dtype {got.dtype}, not {want.dtype}"


def assert_close(
    got: Tensor, want: Tensor, name: str = "result", tolerance: float = 1e-12, floor: float = 1e-3
) -> None:
    """Asserts that the error is at most `tolerance` times the largest of `floor` and the elements of `want`.

    `floor` is for sums that cancel: their rounding error depends on the terms, not on the sum.
    """
    assert_like(got, want, name)
    assert want.isfinite().all(), f"{name}: the reference is not finite, compare with assert_same_finiteness"
    assert got.isfinite().all(), f"{name}: {(~got.isfinite()).sum()} of {got.numel()} elements are not finite"
    error, allowed = largest(got - want), tolerance * max(largest(want), floor)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def assert_low_precision(
    got: Tensor, lows: Sequence[Tensor], exact: Tensor, factor: float, name: str = "result"
) -> None:
    """Asserts that the error of `got` is at most `factor` times that of `lows`, computed by plain torch.

    `exact` is the float64 result for the same inputs. Two errors are compared: the root mean square, which
    hardly varies by chance, and the largest, which detects a single wrong element. The largest error of one
    run does vary by chance, so `lows` may contain several runs, which differ in the order of their sums.
    Since every result is rounded to its dtype, the typical error of `lows` counts as at least half a unit in
    the last place of a typical element, and its largest error as at least one unit of the largest element.
    """
    assert_like(got, lows[0], name)
    assert got.isfinite().all(), f"{name}: {(~got.isfinite()).sum()} of {got.numel()} elements are not finite"
    assert exact.dtype == torch.float64, f"{name}: the exact result is {exact.dtype}"
    eps = torch.finfo(got.dtype).eps
    for kind, size, rounding in (("typical", root_mean_square, eps / 2), ("largest", largest, eps)):
        error = size(got.double() - exact)
        allowed = factor * max(size(torch.stack(list(lows)).double() - exact), rounding * size(exact))
        assert error <= allowed, (
            f"{name}: {kind} error {error:.3g}, allowed {allowed:.3g} ({factor} times plain torch)"
        )


def assert_same_finiteness(got: Tensor, want: Tensor, name: str = "result") -> None:
    """Asserts that vectors (last axis) not finite in `want` are not finite in `got`, and the others agree."""
    assert_like(got, want, name)
    broken = ~want.isfinite().all(-1)
    hidden = broken & got.isfinite().all(-1)
    assert not hidden.any(), f"{name}: {hidden.sum()} of {broken.sum()} non-finite vectors became finite"
    assert_close(got[~broken], want[~broken], name + ", unaffected vectors")


def assert_all_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """assert_close for every tensor that value_and_gradients returns."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert_close(got[name], tensor, name, tolerance)


def assert_all_low_precision(
    got: dict[str, Tensor], lows: Sequence[dict[str, Tensor]], exact: dict[str, Tensor]
) -> None:
    """assert_low_precision for every tensor: twice the error of plain torch, three times for gradients."""
    assert got.keys() == lows[0].keys() == exact.keys()
    for name, tensor in exact.items():
        factor = 2 if name == "value" else 3
        assert_low_precision(got[name], [low[name] for low in lows], tensor, factor, name)
