"""capsops.capsule_routing: the whole layer, which recomputes û in every pass."""

from collections.abc import Callable, Sequence
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
    layer_inputs,
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
    return partial(capsops.capsule_routing, impl=impl, **options.keywords())


def plain(options: Options) -> Callable[..., Tensor]:
    return partial(reference.capsule_routing, **options.keywords())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_capsule_with_identity_is_squash(impl: str, dtype: torch.dtype) -> None:
    """I = J = 1, W = 1: s = u for every T, and v = 25/26 · (0.6, 0.8) for u = (3, 4)."""
    u, weight = torch.tensor([[[3, 4]]], dtype=dtype), torch.eye(2, dtype=dtype).reshape(1, 1, 2, 2)
    for iterations in range(4):
        v = capsops.capsule_routing(u, weight, iterations=iterations, impl=impl)
        assert v.dtype == dtype
        want = torch.tensor([[[25 / 26 * 0.6, 25 / 26 * 0.8]]], dtype=torch.float64)
        assert_close(v.double(), want, tolerance=torch.finfo(dtype).eps)


def test_two_capsules_with_identities_by_hand(impl: str) -> None:
    """I = 2, J = 1, W = 1: s is the sum (3, 0) + (0, 4) plus the bias; with J = 2, half of the sum."""
    u = torch.tensor([[[3, 0], [0, 4]]], dtype=torch.float64)
    one = torch.eye(2, dtype=torch.float64).expand(2, 1, 2, 2)
    v = capsops.capsule_routing(u, one, impl=impl)
    assert_close(v, torch.tensor([[[25 / 26 * 0.6, 25 / 26 * 0.8]]], dtype=torch.float64), tolerance=1e-15)
    v = capsops.capsule_routing(u, one, torch.tensor([[-3, 0]], dtype=torch.float64), impl=impl)
    assert_close(v, torch.tensor([[[0, 16 / 17]]], dtype=torch.float64), tolerance=1e-15)
    # Both output capsules get the same predictions: every coupling is 1/2 (1/3 with an orphan class, T = 1).
    two = torch.eye(2, dtype=torch.float64).expand(2, 2, 2, 2)
    half = torch.tensor([0.6, 0.8], dtype=torch.float64) * 6.25 / 7.25
    v = capsops.capsule_routing(u, two, iterations=3, impl=impl)
    assert_close(v, half.expand(1, 2, 2), tolerance=1e-15)
    third = torch.tensor([0.6, 0.8], dtype=torch.float64) * (25 / 9) / (34 / 9)
    v = capsops.capsule_routing(u, two, iterations=1, leaky=True, impl=impl)
    assert_close(v, third.expand(1, 2, 2), tolerance=1e-15)


def test_gradient_by_hand(impl: str) -> None:
    """I = J = D = K = 1, T = 0: s = w u + β = 2 · 3 + 1, v = s² / (1 + s²), dv/ds = 2 s / (1 + s²)²."""
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (3.0, 2.0, 1.0)]
    u, weight, bias = leaves
    v = capsops.capsule_routing(
        u.view(1, 1, 1), weight.view(1, 1, 1, 1), bias.view(1, 1), iterations=0, impl=impl
    )
    v.backward()
    slope = 14 / 2500
    for leaf, want in zip(leaves, (2 * slope, 3 * slope, slope), strict=True):
        assert_close(leaf.grad, torch.tensor(want, dtype=torch.float64), tolerance=1e-14)


def test_three_iterations_are_the_default(impl: str) -> None:
    u, weight, bias = layer_inputs(Shape(3, 5, 4, 3, 2), bias=True)
    default = capsops.capsule_routing(u, weight, bias, impl=impl)
    assert torch.equal(default, capsops.capsule_routing(u, weight, bias, iterations=3, impl=impl))
    assert not torch.equal(default, capsops.capsule_routing(u, weight, bias, iterations=2, impl=impl))


@pytest.mark.parametrize(("shape", "options"), GRID, ids=str)
def test_equals_the_reference(impl: str, shape: Shape, options: Options) -> None:
    inputs = layer_inputs(shape, options.bias)
    assert_all_close(
        value_and_gradients(ours(impl, options), inputs), value_and_gradients(plain(options), inputs)
    )


# On CPUs float32 has special kernels for K = 4, 16 and 32, and up to three samples are routed one by one.
FLOAT32_SHAPES = [
    *(Shape(5, 9, 3, 7, K) for K in (4, 16, 32)),
    *(Shape(3, 9, 3, D, K) for D, K in ((3, 8), (3, 4), (5, 3))),
]


@pytest.mark.parametrize("options", [Options(2, detach=True, bias=True), Options(4, leaky=True)], ids=str)
@pytest.mark.parametrize("shape", FLOAT32_SHAPES, ids=str)
def test_equals_the_reference_in_float32(impl: str, shape: Shape, options: Options) -> None:
    inputs = layer_inputs(shape, options.bias, torch.float32)
    got = value_and_gradients(ours(impl, options), inputs)
    want = value_and_gradients(plain(options), [x if x is None else x.double() for x in inputs])
    assert_all_close({name: x.double() for name, x in got.items()}, want, tolerance=1e-5)


@pytest.mark.parametrize("options", [Options(T, detach=T == 2, bias=True) for T in range(4)], ids=str)
@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3]
)
def test_gradients_of_some_inputs_only(impl: str, needs: tuple[bool, ...], options: Options) -> None:
    inputs = layer_inputs(Shape(5, 9, 3, 16, 8), bias=True)
    assert_all_close(
        value_and_gradients(ours(impl, options), inputs, needs=needs),
        value_and_gradients(plain(options), inputs, needs=needs),
    )


def by_one_product(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """T = 0 as one matrix product, whose sums the processor's linear algebra library orders."""
    s = torch.einsum("bik,ijdk->bjd", u, weight)
    return reference.squash(s if bias is None else s + bias)


def plain_runs(
    options: Options, inputs: Sequence[Tensor | None], upstream: Tensor
) -> list[dict[str, Tensor]]:
    """Plain torch in several orders; where there is no routing as a product too, as a backend may do it."""
    runs = runs_in_other_orders(plain(options), inputs, (1, 0, None), upstream)
    return runs if options.iterations else [*runs, value_and_gradients(by_one_product, inputs, upstream)]


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("options", FEW_OPTIONS, ids=str)
@pytest.mark.parametrize(
    "shape", [Shape(17, 100, 10, 16, 8), Shape(5, 33, 11, 5, 17), Shape(1, 200, 10, 16, 8)], ids=str
)
def test_low_precision(impl: str, shape: Shape, options: Options, dtype: torch.dtype) -> None:
    inputs = layer_inputs(shape, options.bias, dtype)
    upstream = torch.randn(shape.B, shape.J, shape.D).to(dtype)
    exact = [x if x is None else x.double() for x in inputs]
    assert_all_low_precision(
        value_and_gradients(ours(impl, options), inputs, upstream),
        plain_runs(options, inputs, upstream),
        value_and_gradients(plain(options), exact, upstream.double()),
    )


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_one_output_capsule_in_low_precision(impl: str, dtype: torch.dtype) -> None:
    """As in a generator: no routing, one output capsule, many input capsules."""
    inputs = layer_inputs(Shape(33, 100, 1, 16, 8), True, dtype)
    upstream = torch.randn(33, 1, 16).to(dtype)
    assert_all_low_precision(
        value_and_gradients(ours(impl, Options(3)), inputs, upstream),
        plain_runs(Options(0), inputs, upstream),
        value_and_gradients(plain(Options(0)), [x.double() for x in inputs], upstream.double()),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [Options(0, bias=True), Options(3, bias=True)], ids=str)
@pytest.mark.parametrize("shape", [Shape(17, 5, 3, 16, 8), Shape(3, 4, 5, 3, 2)], ids=str)
def test_memory_layout_changes_nothing(impl: str, shape: Shape, options: Options, layout: str) -> None:
    upstream, arrange = torch.randn(shape.B, shape.J, shape.D, dtype=torch.float64), LAYOUTS[layout]
    strided = [arrange(x) for x in (*layer_inputs(shape, bias=True), upstream)]
    contiguous = [x.contiguous() for x in strided]
    got = value_and_gradients(ours(impl, options), strided[:3], strided[3])
    want = value_and_gradients(ours(impl, options), contiguous[:3], contiguous[3])
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def test_inputs_are_not_changed(impl: str) -> None:
    inputs = layer_inputs(Shape(17, 9, 3, 16, 8), bias=True)
    before = [x.clone() for x in inputs]
    value_and_gradients(ours(impl, Options(3)), inputs)
    for x, same in zip(inputs, before, strict=True):
        assert torch.equal(x, same)


@pytest.mark.parametrize("options", [Options(0, bias=True), Options(1), Options(3, bias=True)], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(0, 3, 2, 4, 5),
        Shape(2, 0, 2, 4, 5),
        Shape(2, 3, 0, 4, 5),
        Shape(2, 3, 2, 0, 5),
        Shape(2, 3, 2, 4, 0),
    ],
    ids=str,
)
def test_empty_inputs(impl: str, shape: Shape, options: Options) -> None:
    """Without input capsules, or with input capsules of length 0, s equals the bias."""
    inputs = layer_inputs(shape, options.bias)
    results = value_and_gradients(ours(impl, options), inputs)
    bias = inputs[2]
    s = torch.zeros(shape.B, shape.J, shape.D, dtype=torch.float64)
    assert_close(results["value"], reference.squash(s if bias is None else s + bias))
    assert torch.equal(results["gradient 0"], torch.zeros_like(inputs[0]))
    assert torch.equal(results["gradient 1"], torch.zeros_like(inputs[1]))
    if bias is not None:
        want = value_and_gradients(lambda b: reference.squash(s + b), [bias])
        assert_close(results["gradient 2"], want["gradient 0"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["u", "weight", "bias", "grad"])
@pytest.mark.parametrize("options", [Options(0), Options(1), Options(3), Options(3, leaky=True)], ids=str)
@pytest.mark.parametrize("shape", [Shape(17, 5, 3, 16, 8), Shape(3, 4, 5, 3, 2)], ids=str)
def test_non_finite_values_neither_vanish_nor_spread(
    impl: str, shape: Shape, options: Options, where: str, bad: float
) -> None:
    u, weight, bias = layer_inputs(shape, bias=True)
    upstream = torch.randn(shape.B, shape.J, shape.D, dtype=torch.float64)
    broken = {"u": u, "weight": weight, "bias": bias, "grad": upstream}[where]
    broken.view(-1)[broken.numel() // 2] = bad
    got = value_and_gradients(ours(impl, options), [u, weight, bias], upstream)
    want = value_and_gradients(plain(options), [u, weight, bias], upstream)
    for name, tensor in want.items():
        assert_same_finiteness(got[name], tensor, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["u", "weight", "bias", "grad"])
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_nan_in_low_precision(impl: str, iterations: int, where: str, dtype: torch.dtype) -> None:
    """The vectors that are NaN in float64, forward and backward, are NaN here; the others are finite."""
    u, weight, bias = layer_inputs(Shape(17, 5, 3, 16, 8), True, dtype)
    upstream = torch.randn(17, 3, 16).to(dtype)
    broken = {"u": u, "weight": weight, "bias": bias, "grad": upstream}[where]
    broken.view(-1)[broken.numel() // 2] = float("nan")
    options = Options(iterations)
    got = value_and_gradients(ours(impl, options), [u, weight, bias], upstream)
    want = value_and_gradients(plain(options), [x.double() for x in (u, weight, bias)], upstream.double())
    for name, tensor in want.items():
        assert torch.equal(got[name].isfinite().all(-1), tensor.isfinite().all(-1)), name


@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("shape", [Shape(17, 7, 3, 16, 8), Shape(2, 7, 3, 4, 3)], ids=str)
def test_large_logits(impl: str, shape: Shape, leaky: bool) -> None:
    """Logits of ±10⁴: the softmax is all or nothing, and no gradient overflows."""
    u, weight, _ = layer_inputs(shape)
    options = Options(3, leaky=leaky)
    for dtype in (torch.float64, torch.float32):
        inputs = [u.to(dtype), weight.to(dtype) * 1e4]
        got = value_and_gradients(ours(impl, options), inputs)
        want = value_and_gradients(plain(options), [x.double() for x in inputs])
        assert_close(got["value"].double(), want["value"], tolerance=1e3 * torch.finfo(dtype).eps)
        assert got["gradient 0"].isfinite().all()
        assert got["gradient 1"].isfinite().all()


@pytest.mark.parametrize(
    "options",
    [Options(0), Options(1, leaky=True), Options(2, bias=True), Options(3, leaky=True, bias=True)],
    ids=str,
)
def test_first_and_second_derivatives(impl: str, options: Options) -> None:
    inputs = [x.requires_grad_() for x in layer_inputs(Shape(2, 3, 2, 2, 2), options.bias) if x is not None]
    assert torch.autograd.gradcheck(ours(impl, options), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours(impl, options), inputs, fast_mode=True)


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_derivatives_at_zero(impl: str, iterations: int) -> None:
    u, weight, _ = layer_inputs(Shape(2, 3, 2, 2, 2))
    u[0] = 0
    inputs = [u.requires_grad_(), weight.requires_grad_()]
    function = ours(impl, Options(iterations))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
