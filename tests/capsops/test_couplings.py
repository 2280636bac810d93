"""capsops.couplings: how much of each input capsule goes to each output capsule in the last pass."""

import math

import pytest
import torch

import capsops
from capsops import reference
from tests.capsops.cases import GRID, LAYOUTS, LOW_PRECISION, Options, Shape, layer_inputs
from tests.capsops.compare import assert_close, assert_low_precision, assert_same_finiteness

COUPLINGS_GRID = [
    (shape, options) for shape, options in GRID if not options.detach or options.iterations == 4
]


def test_by_hand(impl: str) -> None:
    """û = 1 and 2: 1/2 each in the first pass, then the softmax of 1 · 1/5 and 2 · 1/2."""
    u, weight = torch.ones(1, 1, 1).double(), torch.tensor([1.0, 2.0]).double().reshape(1, 2, 1, 1)
    assert capsops.couplings(u, weight, iterations=0, impl=impl).tolist() == [[[1, 1]]]
    assert capsops.couplings(u, weight, iterations=1, impl=impl).tolist() == [[[0.5, 0.5]]]
    third = capsops.couplings(u, weight, iterations=1, leaky=True, impl=impl)
    assert_close(third, torch.full_like(third, 1 / 3), tolerance=1e-15)
    want = torch.tensor([1 / (1 + math.exp(0.8)), 1 / (1 + math.exp(-0.8))], dtype=torch.float64)
    assert_close(capsops.couplings(u, weight, iterations=2, impl=impl).flatten(), want, tolerance=1e-15)


@pytest.mark.parametrize(("shape", "options"), COUPLINGS_GRID, ids=str)
def test_equals_the_reference(impl: str, shape: Shape, options: Options) -> None:
    inputs = layer_inputs(shape, options.bias)
    keywords = {"iterations": options.iterations, "leaky": options.leaky}
    c = capsops.couplings(*inputs, impl=impl, **keywords)
    assert_close(c, reference.couplings(*inputs, **keywords))
    total = c.sum(-1)
    if options.iterations and not options.leaky:
        assert_close(total, torch.ones_like(total), "sum over j")
    elif options.iterations:
        assert (total < 1).all()
        assert (c > 0).all()


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("iterations", range(4))
@pytest.mark.parametrize("shape", [Shape(17, 33, 10, 16, 8), Shape(1, 100, 11, 5, 17)], ids=str)
def test_low_precision(impl: str, shape: Shape, iterations: int, dtype: torch.dtype) -> None:
    inputs = layer_inputs(shape, True, dtype)
    low, exact = reference.couplings(*inputs, iterations=iterations), (x.double() for x in inputs)
    assert_low_precision(
        capsops.couplings(*inputs, iterations=iterations, impl=impl),
        [low],
        reference.couplings(*exact, iterations=iterations),
        factor=2,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_changes_nothing(impl: str, layout: str) -> None:
    strided = [LAYOUTS[layout](x) for x in layer_inputs(Shape(17, 5, 3, 16, 8), bias=True)]
    want = capsops.couplings(*(x.contiguous() for x in strided), impl=impl)
    assert torch.equal(capsops.couplings(*strided, impl=impl), want)


def test_no_gradient(impl: str) -> None:
    u, weight, bias = (x.requires_grad_() for x in layer_inputs(Shape(2, 3, 4, 5, 2), bias=True))
    assert not capsops.couplings(u, weight, bias, impl=impl).requires_grad
    assert not reference.couplings(u, weight, bias).requires_grad


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize(
    "shape", [Shape(0, 3, 2, 4, 5), Shape(2, 0, 2, 4, 5), Shape(2, 3, 0, 4, 5), Shape(2, 3, 2, 0, 5)], ids=str
)
def test_empty_inputs(impl: str, shape: Shape, iterations: int) -> None:
    u, weight, _ = layer_inputs(shape)
    c = capsops.couplings(u, weight, iterations=iterations, impl=impl)
    want = 1 / shape.J if iterations and shape.J else 1
    assert_close(c, torch.full((shape.B, shape.I, shape.J), want, dtype=torch.float64))


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("shape", [Shape(17, 5, 3, 16, 8), Shape(2, 4, 5, 3, 2)], ids=str)
def test_nan_neither_vanishes_nor_spreads(impl: str, shape: Shape, where: int) -> None:
    inputs = layer_inputs(shape, bias=True)
    inputs[where].view(-1)[inputs[where].numel() // 2] = float("nan")
    assert_same_finiteness(capsops.couplings(*inputs, impl=impl), reference.couplings(*inputs))
