"""capsops.dynamic_routing: routing by agreement of precomputed predictions."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import capsops
from capsops import reference
from tests.capsops.cases import (
    FEW_OPTIONS,
    GRID,
    LAYOUTS,
    LOW_PRECISION,
    Options,
    Shape,
    routing_inputs,
    runs_in_other_orders,
    value_and_gradients,
)
from tests.capsops.compare import (
    assert_all_close,
    assert_all_low_precision,
    assert_close,
    assert_same_finiteness,
)


def ours(impl: str, options: Options) -> Callable[..., Tensor]:
    return partial(capsops.dynamic_routing, impl=impl, **options.keywords())


def plain(options: Options) -> Callable[..., Tensor]:
    return partial(reference.dynamic_routing, **options.keywords())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_by_hand(impl: str, dtype: torch.dtype) -> None:
    """One input capsule, û = 1 and 2. Pass 1: c = 1/2, s = (1/2, 1), v = (1/5, 1/2). Logits 1/5 and 1."""
    u_hat = torch.tensor([1, 2], dtype=dtype).reshape(1, 1, 2, 1)
    c = [1 / (1 + math.exp(0.8)), 1 / (1 + math.exp(-0.8))]
    for iterations, s in ((0, [1, 2]), (1, [1 / 2, 1]), (2, [c[0], 2 * c[1]])):
        v = capsops.dynamic_routing(u_hat, iterations=iterations, impl=impl)
        want = torch.tensor([x * x / (1 + x * x) for x in s], dtype=torch.float64).reshape(1, 2, 1)
        assert v.dtype == dtype
        assert_close(v.double(), want, f"T = {iterations}", tolerance=2 * torch.finfo(dtype).eps)


def test_leaky_by_hand(impl: str) -> None:
    """With an orphan class and J = 2, every coupling of the first pass is 1/3, s = (1/3, 2/3)."""
    u_hat = torch.tensor([1.0, 2.0], dtype=torch.float64).reshape(1, 1, 2, 1)
    v = capsops.dynamic_routing(u_hat, iterations=1, leaky=True, impl=impl)
    want = torch.tensor([1 / 10, 4 / 13], dtype=torch.float64).reshape(1, 2, 1)
    assert_close(v, want, tolerance=1e-15)


def test_three_iterations_are_the_default(impl: str) -> None:
    u_hat, bias = routing_inputs(Shape(3, 5, 4, 3, 1), bias=True)
    default = capsops.dynamic_routing(u_hat, bias, impl=impl)
    assert torch.equal(default, capsops.dynamic_routing(u_hat, bias, iterations=3, impl=impl))
    assert not torch.equal(default, capsops.dynamic_routing(u_hat, bias, iterations=2, impl=impl))


@pytest.mark.parametrize(("shape", "options"), GRID, ids=str)
def test_equals_the_reference(impl: str, shape: Shape, options: Options) -> None:
    inputs = routing_inputs(shape, options.bias)
    assert_all_close(
        value_and_gradients(ours(impl, options), inputs), value_and_gradients(plain(options), inputs)
    )


@pytest.mark.parametrize(
    "options", [Options(0, bias=True), Options(1, bias=True), Options(3, bias=True)], ids=str
)
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_gradients_of_some_inputs_only(impl: str, needs: tuple[bool, bool], options: Options) -> None:
    inputs = routing_inputs(Shape(5, 9, 3, 16, 2), bias=True)
    assert_all_close(
        value_and_gradients(ours(impl, options), inputs, needs=needs),
        value_and_gradients(plain(options), inputs, needs=needs),
    )


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("options", FEW_OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [Shape(17, 100, 10, 16, 8), Shape(5, 33, 11, 5, 8)], ids=str)
def test_low_precision(impl: str, shape: Shape, options: Options, dtype: torch.dtype) -> None:
    inputs = routing_inputs(shape, options.bias, dtype)
    upstream = torch.randn(shape.B, shape.J, shape.D).to(dtype)
    exact = [x if x is None else x.double() for x in inputs]
    assert_all_low_precision(
        value_and_gradients(ours(impl, options), inputs, upstream),
        runs_in_other_orders(plain(options), inputs, (1, None), upstream),
        value_and_gradients(plain(options), exact, upstream.double()),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [Options(0, bias=True), Options(3, bias=True)], ids=str)
@pytest.mark.parametrize("shape", [Shape(17, 5, 3, 16, 8), Shape(3, 4, 5, 3, 2)], ids=str)
def test_memory_layout_changes_nothing(impl: str, shape: Shape, options: Options, layout: str) -> None:
    u_hat, bias = routing_inputs(shape, bias=True)
    upstream, arrange = torch.randn(shape.B, shape.J, shape.D, dtype=torch.float64), LAYOUTS[layout]
    strided = [arrange(x) for x in (u_hat, bias, upstream)]
    contiguous = [x.contiguous() for x in strided]
    got = value_and_gradients(ours(impl, options), strided[:2], strided[2])
    want = value_and_gradients(ours(impl, options), contiguous[:2], contiguous[2])
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("options", [Options(0, bias=True), Options(1), Options(3, bias=True)], ids=str)
@pytest.mark.parametrize(
    "shape", [Shape(0, 3, 2, 4, 1), Shape(2, 0, 2, 4, 1), Shape(2, 3, 0, 4, 1), Shape(2, 3, 2, 0, 1)], ids=str
)
def test_empty_inputs(impl: str, shape: Shape, options: Options) -> None:
    """Without input capsules s equals the bias."""
    u_hat, bias = routing_inputs(shape, options.bias)
    results = value_and_gradients(ours(impl, options), [u_hat, bias])
    s = torch.zeros(shape.B, shape.J, shape.D, dtype=torch.float64)
    s = s if bias is None else s + bias
    assert_close(results["value"], reference.squash(s))
    assert results["gradient 0"].shape == u_hat.shape
    if bias is not None:
        want = value_and_gradients(lambda b: reference.squash(s * 0 + b), [bias])
        assert_close(results["gradient 1"], want["gradient 0"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["u_hat", "bias", "grad"])
@pytest.mark.parametrize("options", [Options(0), Options(1), Options(3), Options(3, leaky=True)], ids=str)
@pytest.mark.parametrize("shape", [Shape(17, 5, 3, 16, 8), Shape(3, 4, 5, 3, 2)], ids=str)
def test_non_finite_values_neither_vanish_nor_spread(
    impl: str, shape: Shape, options: Options, where: str, bad: float
) -> None:
    u_hat, bias = routing_inputs(shape, bias=True)
    upstream = torch.randn(shape.B, shape.J, shape.D, dtype=torch.float64)
    broken = {"u_hat": u_hat, "bias": bias, "grad": upstream}[where]
    broken.view(-1)[broken.numel() // 2] = bad
    got = value_and_gradients(ours(impl, options), [u_hat, bias], upstream)
    want = value_and_gradients(plain(options), [u_hat, bias], upstream)
    for name, tensor in want.items():
        assert_same_finiteness(got[name], tensor, name)


@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_large_logits(impl: str, dtype: torch.dtype, leaky: bool) -> None:
    """Logits of ±10⁴: the softmax is all or nothing, and no gradient overflows."""
    u_hat = (torch.randn(5, 7, 3, 4, dtype=torch.float64) * 1e4).to(dtype)
    options = Options(3, leaky=leaky)
    got = value_and_gradients(ours(impl, options), [u_hat])
    want = value_and_gradients(plain(options), [u_hat.double()])
    assert_close(got["value"].double(), want["value"], tolerance=1e3 * torch.finfo(dtype).eps)
    assert got["gradient 0"].isfinite().all()


@pytest.mark.parametrize("size", [1e20, 1e30, 1e-20, 1e-30])
def test_huge_and_tiny_predictions_stay_finite(impl: str, size: float) -> None:
    u_hat = torch.randn(17, 7, 3, 8) * size
    results = value_and_gradients(ours(impl, Options(3)), [u_hat])
    assert results["value"].isfinite().all()
    length = results["value"].norm(dim=-1)
    if size > 1:  # an output capsule is a unit vector, or gets no input capsule at all
        assert ((length - 1).abs().minimum(length) < 1e-5).all()
        assert (length.amax(1) > 0.999).all()
    else:
        assert (length <= size).all()


@pytest.mark.parametrize(
    "options",
    [Options(0), Options(1, leaky=True), Options(2, bias=True), Options(3, leaky=True, bias=True)],
    ids=str,
)
def test_first_and_second_derivatives(impl: str, options: Options) -> None:
    u_hat, bias = routing_inputs(Shape(2, 3, 2, 2, 1), options.bias)
    inputs = [x.requires_grad_() for x in (u_hat, bias) if x is not None]
    assert torch.autograd.gradcheck(ours(impl, options), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours(impl, options), inputs, fast_mode=True)


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_derivatives_at_zero(impl: str, iterations: int) -> None:
    u_hat = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    u_hat[0] = 0
    function = ours(impl, Options(iterations))
    assert torch.autograd.gradcheck(function, u_hat.requires_grad_())
    assert torch.autograd.gradgradcheck(function, u_hat, fast_mode=True)
