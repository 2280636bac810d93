"""The helpers of cases.py: a layout that does not match its name would test less than it should."""

import pytest
import torch

from tests.capsops.cases import LAYOUTS, runs_in_other_orders, value_and_gradients

X = torch.arange(24, dtype=torch.float64).reshape(2, 3, 4)


@pytest.mark.parametrize(("name", "strides"), [("sliced", (24, 8, 2)), ("transposed", (1, 2, 6))])
def test_layouts_keep_values(name: str, strides: tuple[int, ...]) -> None:
    view = LAYOUTS[name](X)
    assert torch.equal(view, X)
    assert view.stride() == strides


def test_offset_is_contiguous_and_unaligned() -> None:
    view = LAYOUTS["offset"](X)
    assert torch.equal(view, X)
    assert view.is_contiguous()
    assert view.storage_offset() == 1


def test_expanded_and_constant_repeat_with_stride_0() -> None:
    assert torch.equal(LAYOUTS["expanded"](X), torch.stack([X[0], X[0]]))
    assert LAYOUTS["expanded"](X).stride(0) == 0
    assert LAYOUTS["constant"](X + 5).unique().tolist() == [5]
    assert LAYOUTS["constant"](X).stride() == (0, 0, 0)


def test_value_and_gradients() -> None:
    def product(a: torch.Tensor, b: torch.Tensor, c: None) -> torch.Tensor:
        return a * b

    results = value_and_gradients(product, [X, X + 1, None], upstream=torch.full_like(X, 2))
    assert set(results) == {"value", "gradient 0", "gradient 1"}
    assert torch.equal(results["gradient 0"], 2 * (X + 1))
    assert set(value_and_gradients(product, [X, X, None], needs=[False, True, False])) == {
        "value",
        "gradient 1",
    }


def test_runs_in_other_orders_differ_only_by_rounding() -> None:
    u, weight = torch.randn(5, 40, 3), torch.randn(40, 3)

    def product(u: torch.Tensor, weight: torch.Tensor, bias: None) -> torch.Tensor:
        return torch.einsum("bik,ik->b", u, weight)

    first, *others = runs_in_other_orders(product, [u, weight, None], (1, 0, None), torch.ones(5))
    assert torch.allclose(first["gradient 1"], u.sum(0), atol=1e-5)
    assert len(others) == 3
    for run in others:
        assert not torch.equal(run["value"], first["value"])
        assert torch.allclose(run["value"], first["value"], atol=1e-4)
        assert torch.allclose(run["gradient 0"], first["gradient 0"], atol=1e-5)
        assert torch.allclose(run["gradient 1"], first["gradient 1"], atol=1e-5)
