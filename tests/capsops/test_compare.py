"""The comparisons of compare.py: each accepts errors within its bound and rejects those just above it."""

import pytest
import torch

from tests.capsops.compare import (
    assert_close,
    assert_low_precision,
    assert_same_finiteness,
    largest,
    root_mean_square,
)

NAN, INF = float("nan"), float("inf")


def vector(*values: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def test_largest() -> None:
    assert largest(vector(1, -3, 2)) == 3
    assert largest(vector()) == 0


def test_close_accepts_errors_within_the_bound() -> None:
    assert_close(vector(100, 1 + 0.9e-10), vector(100, 1))
    assert_close(vector(0.9e-15), vector(0))
    assert_close(vector(), vector())


@pytest.mark.parametrize(
    ("got", "want", "message"),
    [
        (vector(100, 1 + 1.1e-10), vector(100, 1), r"û: error 1.1e-10, allowed 1e-10"),
        (vector(1.1e-15), vector(0), "û: error 1.1e-15, allowed 1e-15"),
        (vector(1, NAN), vector(1, 1), "û: 1 of 2 elements are not finite"),
        (vector(1, INF), vector(1, 1), "û: 1 of 2 elements are not finite"),
        (vector(1), vector(NAN), "û: the reference is not finite"),
        (vector(1), vector(1, 1), r"û: shape \[1\], not \[2\]"),
        (vector(1, dtype=torch.float32), vector(1), "û: dtype torch.float32, not torch.float64"),
    ],
)
def test_close_rejects_larger_errors_and_other_tensors(
    got: torch.Tensor, want: torch.Tensor, message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_close(got, want, "û")


def test_root_mean_square() -> None:
    assert root_mean_square(vector(3, -4, 0, 0)) == 2.5
    assert root_mean_square(vector()) == 0


def test_low_precision_allows_a_multiple_of_the_error_of_plain_torch() -> None:
    exact = vector(1, 2)
    low = vector(1.5, 2.5, dtype=torch.float32)
    assert_low_precision(vector(2, 1, dtype=torch.float32), [low], exact, 2)
    with pytest.raises(AssertionError, match=r"typical error 1.01, allowed 1 \(2 times plain torch\)"):
        assert_low_precision(vector(2.01, 0.99, dtype=torch.float32), [low], exact, 2)
    with pytest.raises(AssertionError, match=r"largest error 1.25, allowed 1 \(2 times plain torch\)"):
        assert_low_precision(vector(2.25, 2, dtype=torch.float32), [low], exact, 2)


def test_low_precision_takes_the_largest_error_of_several_runs() -> None:
    exact, lows = vector(1, 1), [vector(*x, dtype=torch.float32) for x in ((1.875, 0.125), (1, 2))]
    assert_low_precision(vector(1, 3, dtype=torch.float32), lows, exact, 2)
    with pytest.raises(AssertionError, match=r"largest error 2\.1, allowed 2 "):
        assert_low_precision(vector(1, 3.1, dtype=torch.float32), lows, exact, 2)
    with pytest.raises(AssertionError, match=r"largest error 2, allowed 1\.75 "):
        assert_low_precision(vector(1, 3, dtype=torch.float32), lows[:1], exact, 2)


def test_low_precision_allows_the_rounding_of_the_result_when_plain_torch_is_exact() -> None:
    exact, low = vector(1, 1), vector(1, 1, dtype=torch.bfloat16)
    assert_low_precision(vector(1 + 2**-7, 1 - 2**-7, dtype=torch.bfloat16), [low], exact, 2)
    with pytest.raises(AssertionError, match=r"typical error 0.0156, allowed 0.00781"):
        assert_low_precision(vector(1 + 2**-6, 1 - 2**-6, dtype=torch.bfloat16), [low], exact, 2)
    wide_exact, wide_low = torch.ones(1000, dtype=torch.float64), torch.ones(1000, dtype=torch.bfloat16)
    got = wide_low.clone()
    got[0] += 2**-6
    assert_low_precision(got, [wide_low], wide_exact, 2)
    got[0] += 2**-6
    with pytest.raises(AssertionError, match=r"largest error 0.0312, allowed 0.0156"):
        assert_low_precision(got, [wide_low], wide_exact, 2)


def test_low_precision_rejects_non_finite_results_and_inexact_references() -> None:
    low = vector(1, 2, dtype=torch.float32)
    with pytest.raises(AssertionError, match="not finite"):
        assert_low_precision(vector(1, NAN, dtype=torch.float32), [low], vector(1, 2), 2)
    with pytest.raises(AssertionError, match=r"exact result is torch\.float32"):
        assert_low_precision(low, [low], low, 2)


def test_same_finiteness() -> None:
    want = vector(1, NAN, 2, 3).reshape(2, 2)
    assert_same_finiteness(vector(INF, 0, 2, 3).reshape(2, 2), want)
    with pytest.raises(AssertionError, match="1 of 1 non-finite vectors became finite"):
        assert_same_finiteness(vector(1, 0, 2, 3).reshape(2, 2), want)
    with pytest.raises(AssertionError, match="unaffected vectors: error 1"):
        assert_same_finiteness(vector(1, NAN, 2, 4).reshape(2, 2), want)
    with pytest.raises(AssertionError, match="unaffected vectors: 1 of 2 elements are not finite"):
        assert_same_finiteness(vector(1, NAN, 2, NAN).reshape(2, 2), want)
