"""The helpers: a layout that is not what its name says would leave the ops untested."""

import pytest
import torch

from tests.capsops.cases import LAYOUTS, value_and_gradients

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

    found = value_and_gradients(product, [X, X + 1, None], upstream=torch.full_like(X, 2))
    assert set(found) == {"value", "gradient 0", "gradient 1"}
    assert torch.equal(found["gradient 0"], 2 * (X + 1))
    assert set(value_and_gradients(product, [X, X, None], needs=[False, True, False])) == {
        "value",
        "gradient 1",
    }
