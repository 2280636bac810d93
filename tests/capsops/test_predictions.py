"""capsops.predictions: û_ij = W_ij u_i."""

from functools import partial

import pytest
import torch

import capsops
from capsops import reference
from tests.capsops.cases import LAYOUTS, LOW_PRECISION, SHAPES, Shape, layer_inputs, value_and_gradients
from tests.capsops.compare import assert_all_close, assert_all_low_precision, assert_same_finiteness


def test_by_hand(impl: str) -> None:
    u = torch.tensor([[[1.0, 2.0]]])
    weight = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [[0.0, 3.0], [2.0, 0.0], [1.0, -1.0]]]])
    assert capsops.predictions(u, weight, impl=impl).tolist() == [[[[1, 2, 3], [6, 2, -1]]]]


def test_gradient_by_hand(impl: str) -> None:
    """∂u_i = Σ_j W_ijᵀ ∂û_ij, ∂W_ij = Σ_b ∂û_ij u_iᵀ."""
    u = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]], requires_grad=True)
    weight = torch.tensor([[[[1.0, 10.0]], [[100.0, 1000.0]]]], requires_grad=True)
    capsops.predictions(u, weight, impl=impl).backward(torch.tensor([1.0, 2, 3, 4]).reshape(2, 1, 2, 1))
    assert u.grad.tolist() == [[[201, 2010]], [[403, 4030]]]
    assert weight.grad.tolist() == [[[[10, 14]], [[14, 20]]]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(impl: str, shape: Shape) -> None:
    u, weight, _ = layer_inputs(shape)
    function = partial(capsops.predictions, impl=impl)
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        assert_all_close(
            value_and_gradients(function, [u, weight], needs=needs),
            value_and_gradients(reference.predictions, [u, weight], needs=needs),
        )


@pytest.mark.parametrize("K", [*range(1, 18), 32, 40])
def test_equals_the_reference_at_any_depth(impl: str, K: int) -> None:
    """On CPUs the kernel depends on K, on the number of samples, and on whether J·D fills registers."""
    for sizes in ((1, 5, 4, 16), (2, 3, 3, 5), (3, 4, 2, 8), (4, 9, 5, 7), (5, 1, 2, 16), (11, 5, 3, 16)):
        u, weight, _ = layer_inputs(Shape(*sizes, K))
        assert_all_close(
            value_and_gradients(partial(capsops.predictions, impl=impl), [u, weight]),
            value_and_gradients(reference.predictions, [u, weight]),
        )


@pytest.mark.parametrize("I", [1, 3, 12, 13])
def test_equals_the_reference_with_few_input_capsules_for_the_threads(impl: str, I: int) -> None:  # noqa: E741
    for K, D in ((8, 16), (5, 7)):
        u, weight, _ = layer_inputs(Shape(67, I, 20, D, K))
        want = value_and_gradients(reference.predictions, [u, weight])
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_all_close(value_and_gradients(partial(capsops.predictions, impl=impl), [u, weight]), want)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.B * s.I * s.J * s.D > 5000], ids=str)
def test_low_precision(impl: str, shape: Shape, dtype: torch.dtype) -> None:
    u, weight, _ = layer_inputs(shape, dtype=dtype)
    upstream = torch.randn(*shape[:4]).to(dtype)
    assert_all_low_precision(
        value_and_gradients(partial(capsops.predictions, impl=impl), [u, weight], upstream),
        [value_and_gradients(reference.predictions, [u, weight], upstream)],
        value_and_gradients(reference.predictions, [u.double(), weight.double()], upstream.double()),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_passes_unchanged(impl: str, dtype: torch.dtype) -> None:
    u = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    u_hat = capsops.predictions(u.view(64, 1024, 1), torch.ones(1024, 1, 1, 1, dtype=dtype), impl=impl)
    assert torch.equal(
        u_hat.flatten().nan_to_num(-7, torch.inf, -torch.inf), u.nan_to_num(-7, torch.inf, -torch.inf)
    )


@pytest.mark.parametrize(
    ("dtype", "bits", "steps", "exponents"),
    [
        (torch.bfloat16, 8, (1, 1), [(0, 0)]),
        # normal, subnormal, and around the largest number: 1008 · 65 is a tie that becomes infinite
        (torch.float16, 11, (31, 4), [(0, 0), (-8, -9), (7, 8)]),
    ],
)
def test_products_in_16_bits_are_rounded_to_even(
    impl: str, dtype: torch.dtype, bits: int, steps: tuple[int, int], exponents: list[tuple[int, int]]
) -> None:
    """With K = 1 every product is exact in float32, and many are midway between two results."""
    significands = torch.arange(2 ** (bits - 1), 2**bits) * torch.tensor([1, -1]).repeat(2 ** (bits - 2))
    for pair in exponents:
        u, weight = (
            significands[::step].to(dtype) * 2.0 ** (1 - bits + exponent)
            for step, exponent in zip(steps, pair, strict=True)
        )
        u_hat = capsops.predictions(u.view(-1, 1, 1), weight.view(1, -1, 1, 1), impl=impl)
        assert torch.equal(u_hat.view(len(u), len(weight)), (u[:, None].float() * weight.float()).to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [Shape(17, 5, 3, 16, 8), Shape(3, 4, 5, 3, 2)], ids=str)
def test_memory_layout_changes_nothing(impl: str, shape: Shape, layout: str) -> None:
    u, weight, _ = layer_inputs(shape)
    upstream = torch.randn(shape[:4], dtype=torch.float64)
    function, arrange = partial(capsops.predictions, impl=impl), LAYOUTS[layout]
    strided = [arrange(x) for x in (u, weight, upstream)]
    contiguous = [x.contiguous() for x in strided]
    got = value_and_gradients(function, strided[:2], strided[2])
    want = value_and_gradients(function, contiguous[:2], contiguous[2])
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(
    "shape", [Shape(0, 3, 2, 4, 5), Shape(2, 0, 2, 4, 5), Shape(2, 3, 0, 4, 5), Shape(2, 3, 2, 0, 5)], ids=str
)
def test_empty_inputs(impl: str, shape: Shape) -> None:
    u, weight, _ = layer_inputs(shape)
    got = value_and_gradients(partial(capsops.predictions, impl=impl), [u, weight])
    assert got["value"].shape == shape[:4]
    assert torch.equal(got["gradient 0"], torch.zeros_like(u))
    assert torch.equal(got["gradient 1"], torch.zeros_like(weight))


def test_capsules_without_components_predict_zero(impl: str) -> None:
    u, weight = torch.ones(2, 3, 0, requires_grad=True), torch.ones(3, 4, 5, 0, requires_grad=True)
    u_hat = capsops.predictions(u, weight, impl=impl)
    assert torch.equal(u_hat, torch.zeros(2, 3, 4, 5))
    u_hat.sum().backward()
    assert u.grad.shape == u.shape
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("shape", [Shape(17, 5, 3, 16, 8), Shape(2, 4, 5, 3, 2)], ids=str)
def test_non_finite_values_neither_vanish_nor_spread(impl: str, shape: Shape, where: int, bad: float) -> None:
    u, weight, _ = layer_inputs(shape)
    upstream = torch.randn(shape[:4], dtype=torch.float64)
    broken = (u, weight, upstream)[where]
    broken.view(-1)[broken.numel() // 2] = bad
    got = value_and_gradients(partial(capsops.predictions, impl=impl), [u, weight], upstream)
    want = value_and_gradients(reference.predictions, [u, weight], upstream)
    for name, tensor in want.items():
        assert_same_finiteness(got[name], tensor, name)


def test_first_and_second_derivatives(impl: str) -> None:
    u, weight, _ = layer_inputs(Shape(2, 3, 2, 2, 3))
    inputs = [u.requires_grad_(), weight.requires_grad_()]
    assert torch.autograd.gradcheck(partial(capsops.predictions, impl=impl), inputs)
    assert torch.autograd.gradgradcheck(partial(capsops.predictions, impl=impl), inputs)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_the_reference_computes_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    u, weight, _ = layer_inputs(Shape(33, 50, 10, 16, 8), bias=False, dtype=dtype)
    want = reference.predictions(u.float(), weight.float()).to(dtype)
    formula, dtypes = reference.predictions, []

    def recording(*tensors: torch.Tensor) -> torch.Tensor:
        dtypes.extend(tensor.dtype for tensor in tensors)
        return formula(*tensors)

    monkeypatch.setattr(reference, "predictions", recording)
    assert torch.equal(capsops.predictions(u, weight, impl="reference"), want)
    assert dtypes == [torch.float32] * 2
