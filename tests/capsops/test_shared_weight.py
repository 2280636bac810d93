"""Weights [J, D, K] that all input capsules share, and û [B, I, D] the same for all output capsules."""

from itertools import cycle, product

import pytest
import torch

import capsops
from capsops import reference
from capsops.backends.backend import LOGITS, SHARED
from tests.capsops.cases import (
    ALL_OPTIONS,
    FEW_OPTIONS,
    LAYOUTS,
    Options,
    Shape,
    layer_inputs,
    value_and_gradients,
)
from tests.capsops.compare import assert_close
from tests.capsops.routing_options import (
    EMPTY_SHAPES,
    SHAPES,
    Routing,
    assert_derivatives,
    assert_equals_the_formula,
    assert_same_results,
    float64,
    ours,
    plain,
    skip_unless_supported,
    tensors,
)
from tests.tiers import fast_only

OPS = ["capsule_routing", "dynamic_routing"]


@pytest.fixture(autouse=True)
def supported(impl: str) -> None:
    skip_unless_supported(impl, frozenset((SHARED,)))


def test_by_hand(impl: str) -> None:
    """W = 1 and 2, u = 1 twice. T = 0: s = 2 and 4, v = 4/5, 16/17. T = 1: s = 1 and 2, v = 1/2, 4/5."""
    u, weight = torch.ones(1, 2, 1).double(), float64(1, 2).view(2, 1, 1)
    for iterations, want in ((0, (4 / 5, 16 / 17)), (1, (1 / 2, 4 / 5))):
        for shared in (weight, weight[None]):
            v = capsops.capsule_routing(u, shared, iterations=iterations, impl=impl)
            assert_close(v.flatten(), float64(*want), tolerance=1e-15)
    # pass 2: û · V = 1 · 1/2 and 2 · 4/5
    c = capsops.couplings(u, weight, iterations=2, impl=impl)
    assert_close(c[0, 1], float64(1 / 2, 8 / 5).softmax(0), tolerance=1e-15)


def test_predictions_alike_for_all_outputs_by_hand(impl: str) -> None:
    """û = 3 and 1, β = 0 and 1, T = 1: c = 1/2, s = 2 and 3, v = 4/5 and 9/10."""
    v = capsops.dynamic_routing(
        float64(3, 1).view(1, 2, 1), float64(0, 1).view(2, 1), iterations=1, impl=impl
    )
    assert_close(v.flatten(), float64(4 / 5, 9 / 10), tolerance=1e-15)


def test_the_number_of_output_capsules_is_that_of_logits_or_bias(impl: str) -> None:
    skip_unless_supported(impl, frozenset((SHARED, LOGITS)))
    u_hat, bias = torch.randn(2, 5, 3), torch.randn(4, 3)
    logits = torch.randn(4)
    for b, start in (
        (bias, None),
        (None, logits),
        (bias, logits),
        (bias, torch.zeros(())),
        (bias, torch.zeros(5, 1)),
    ):
        v = capsops.dynamic_routing(u_hat, b, logits=start, impl=impl)
        assert v.shape == (2, 4, 3)
        want = reference.dynamic_routing(u_hat[:, :, None].expand(2, 5, 4, 3), b, logits=start)
        torch.testing.assert_close(v, want)
    assert capsops.dynamic_routing(u_hat, logits=torch.zeros(5, 1), impl=impl).shape == (2, 1, 3)
    assert capsops.dynamic_routing(u_hat, torch.zeros(1, 3), impl=impl).shape == (2, 1, 3)


FAST = [
    (shape, Routing(options, shared=True))
    for shape, options in zip(SHAPES * 2, cycle(FEW_OPTIONS), strict=False)
]
EVERY = [
    (shape, Routing(options, shared=True))
    for shape, options in product(
        [Shape(5, 9, 3, 4, 2), Shape(17, 6, 10, 16, 8), Shape(3, 5, 1, 3, 2)], ALL_OPTIONS
    )
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("shape", "routing"), [*FAST, *fast_only(EVERY[::7], EVERY)], ids=str)
def test_equals_the_formula(impl: str, shape: Shape, routing: Routing, op: str) -> None:
    assert_equals_the_formula(op, impl, shape, routing)


@pytest.mark.parametrize(("shape", "routing"), FAST[:13], ids=str)
def test_couplings_equal_the_formula(impl: str, shape: Shape, routing: Routing) -> None:
    u, weight, bias, *_ = tensors("capsule_routing", shape, routing)
    keywords = {"iterations": routing.options.iterations, "leaky": routing.options.leaky}
    want = reference.couplings(u, weight, bias, **keywords)
    for shared in (weight, weight[None]):
        assert_close(capsops.couplings(u, shared, bias, impl=impl, **keywords), want)


@pytest.mark.parametrize("options", FEW_OPTIONS, ids=str)
@pytest.mark.parametrize(
    "shape", [Shape(5, 9, 3, 4, 2), Shape(17, 33, 11, 16, 8), Shape(2, 1, 5, 3, 4)], ids=str
)
def test_equals_the_expanded_weight(impl: str, shape: Shape, options: Options) -> None:
    """With and without the axis of I, which is of length 1: value and gradients."""
    u, weight, bias = layer_inputs(shape, options.bias)
    function = ours("capsule_routing", impl, Routing(options))
    want = value_and_gradients(function, [u, weight[:1].expand_as(weight), bias])
    want["gradient 1"] = want["gradient 1"].sum(0)
    got = value_and_gradients(function, [u, weight[0], bias])
    assert_same_results(got, want)
    got = value_and_gradients(function, [u, weight[:1], bias])
    assert got["gradient 1"].shape == weight[:1].shape
    assert_same_results({**got, "gradient 1": got["gradient 1"][0]}, want)


@pytest.mark.parametrize("options", FEW_OPTIONS, ids=str)
@pytest.mark.parametrize(
    "shape", [Shape(5, 9, 3, 4, 2), Shape(17, 33, 11, 16, 8), Shape(2, 1, 5, 3, 4)], ids=str
)
def test_equals_the_expanded_predictions(impl: str, shape: Shape, options: Options) -> None:
    u_hat = torch.randn(shape.B, shape.I, shape.D, dtype=torch.float64)
    bias = torch.randn(shape.J, shape.D, dtype=torch.float64)
    function = ours("dynamic_routing", impl, Routing(options))
    expanded = u_hat[:, :, None].expand(-1, -1, shape.J, -1)
    want = value_and_gradients(function, [expanded, None, bias])
    want["gradient 0"] = want["gradient 0"].sum(2)
    assert_same_results(value_and_gradients(function, [u_hat, None, bias]), want)


@pytest.mark.parametrize("needs", list(product((False, True), repeat=3)))
@pytest.mark.parametrize("iterations", [0, 2])
def test_gradients_of_some_inputs_only(impl: str, iterations: int, needs: tuple[bool, ...]) -> None:
    routing = Routing(Options(iterations, bias=True), shared=True)
    inputs = tensors("capsule_routing", Shape(5, 9, 3, 16, 8), routing)
    wanted = (*needs, False, False)
    assert_same_results(
        value_and_gradients(ours("capsule_routing", impl, routing), inputs, needs=wanted),
        value_and_gradients(plain("capsule_routing", routing), inputs, needs=wanted),
    )


@pytest.mark.parametrize("needs", [(True, False, True), (False, False, True), (False, True, False)])
def test_gradients_of_some_inputs_with_long_output_capsules(impl: str, needs: tuple[bool, ...]) -> None:
    """Output capsules larger than all else: what the kernel has no memory for must not be written."""
    routing = Routing(Options(3, bias=True), shared=True)
    inputs = tensors("capsule_routing", Shape(4, 8, 2, 256, 2), routing)
    wanted = (*needs, False, False)
    assert_same_results(
        value_and_gradients(ours("capsule_routing", impl, routing), inputs, needs=wanted),
        value_and_gradients(plain("capsule_routing", routing), inputs, needs=wanted),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [Shape(17, 5, 3, 16, 8), Shape(3, 4, 5, 3, 2)], ids=str)
def test_memory_layout_changes_nothing(impl: str, shape: Shape, op: str, layout: str) -> None:
    routing, arrange = Routing(Options(3, bias=True), shared=True), LAYOUTS[layout]
    strided = [x if x is None else arrange(x) for x in tensors(op, shape, routing)]
    upstream = arrange(torch.randn(shape.B, shape.J, shape.D, dtype=torch.float64))
    contiguous = [x if x is None else x.contiguous() for x in strided]
    got = value_and_gradients(ours(op, impl, routing), strided, upstream)
    want = value_and_gradients(ours(op, impl, routing), contiguous, upstream.contiguous())
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_not_changed(impl: str, op: str) -> None:
    inputs = tensors(op, Shape(17, 9, 3, 16, 8), Routing(Options(3, bias=True), shared=True))
    before = [x if x is None else x.clone() for x in inputs]
    value_and_gradients(ours(op, impl, Routing(Options(3))), inputs)
    assert all(x is None or torch.equal(x, same) for x, same in zip(inputs, before, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("iterations", [0, 3])
@pytest.mark.parametrize("shape", [Shape(17, 5, 3, 16, 8), Shape(3, 4, 5, 3, 2)], ids=str)
def test_a_sample_or_an_output_capsule_that_is_not_finite(
    impl: str, shape: Shape, iterations: int, where: int, bad: float
) -> None:
    """Where the formula gives a vector that is not finite, so does the op; the others agree."""
    routing = Routing(Options(iterations, bias=True), shared=True)
    inputs = tensors("capsule_routing", shape, routing)
    inputs[where].view(-1)[inputs[where].numel() // 2] = bad
    got, want = ours("capsule_routing", impl, routing)(*inputs), plain("capsule_routing", routing)(*inputs)
    finite = want.isfinite().all(-1)
    assert torch.equal(got.isfinite().all(-1), finite)
    assert_close(got[finite], want[finite])


@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_large_logits(impl: str, dtype: torch.dtype, leaky: bool) -> None:
    """Logits of ±10⁴: the softmax is all or nothing, and no gradient overflows."""
    routing = Routing(Options(3, leaky=leaky), shared=True)
    u, weight, *others = tensors("capsule_routing", Shape(17, 7, 3, 16, 8), routing)
    inputs = [u.to(dtype), (weight * 1e4).to(dtype), *others]
    got = value_and_gradients(ours("capsule_routing", impl, routing), inputs)
    want = plain("capsule_routing", routing)(*(x if x is None else x.double() for x in inputs))
    assert_close(got["value"].double(), want, tolerance=1e3 * torch.finfo(dtype).eps)
    assert all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize("options", [Options(0), Options(1, leaky=True), Options(2, bias=True)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_derivatives(impl: str, op: str, options: Options) -> None:
    """s of the first sample is 0, or the bias."""
    routing = Routing(options, shared=True)
    inputs = tensors(op, Shape(2, 3, 2, 2, 2), routing)
    inputs[0][0] = 0
    assert_derivatives(ours(op, impl, routing), inputs)


@pytest.mark.parametrize("iterations", [0, 3])
@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_empty_inputs(impl: str, op: str, shape: Shape, iterations: int) -> None:
    routing = Routing(Options(iterations, bias=True), shared=True)
    inputs = tensors(op, shape, routing)
    assert_same_results(
        value_and_gradients(ours(op, impl, routing), inputs), value_and_gradients(plain(op, routing), inputs)
    )


def test_a_weight_of_one_input_capsule_is_its_own(impl: str) -> None:
    """[1, J, D, K] with I = 1 is both, and the gradient has its shape."""
    u, weight, _ = layer_inputs(Shape(3, 1, 4, 5, 2))
    got = value_and_gradients(lambda *x: capsops.capsule_routing(*x, impl=impl), [u, weight])
    want = value_and_gradients(lambda *x: capsops.capsule_routing(*x, impl=impl), [u, weight[0]])
    assert_close(got["value"], want["value"])
    assert_close(got["gradient 1"][0], want["gradient 1"])
