"""capsops.squash: by hand, against the reference, at the ends of the number range, in every memory layout."""

from functools import partial

import pytest
import torch

import capsops
from capsops import reference
from tests.capsops.cases import LAYOUTS, LOW_PRECISION, value_and_gradients
from tests.capsops.compare import assert_all_close, assert_all_low_precision, assert_close, assert_like

NAN, INF = float("nan"), float("inf")

# (shape, dim)
CASES = [
    ((1,), 0),
    ((5,), -1),
    ((1000,), 0),
    ((7, 1), 1),
    ((63, 3), 1),
    ((33, 4), 1),
    ((100, 8), 1),
    ((15, 16), 1),
    ((5, 17), 1),
    ((2, 1000), 1),
    ((17, 33), 0),
    ((2, 7, 16), 2),
    ((3, 5, 7), 1),
    ((4, 16, 33), 1),
    ((5, 3, 2), 0),
    ((2, 3, 1, 5, 4), -2),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_by_hand(impl: str, dtype: torch.dtype) -> None:
    # ‖(3, 4)‖ = 5: the length becomes 25/26 and the direction stays (0.6, 0.8)
    v = capsops.squash(torch.tensor([[3, 4], [0, 0], [0, -1]], dtype=dtype), impl=impl)
    want = torch.tensor([[25 / 26 * 0.6, 25 / 26 * 0.8], [0, 0], [0, -0.5]], dtype=torch.float64)
    assert_like(v, want.to(dtype))
    assert_close(v.double(), want, tolerance=torch.finfo(dtype).eps)


def test_gradient_by_hand(impl: str) -> None:
    # f(r) = r / (1 + r²), f(5) = 5/26: across s the Jacobian is f(5), along s f(5) + 5 f′(5) = 5/26 − 120/676
    s = torch.tensor([[0, 5], [0, 5], [0, 0]], dtype=torch.float64, requires_grad=True)
    capsops.squash(s, impl=impl).backward(torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64))
    want = torch.tensor([[5 / 26, 0], [0, 5 / 26 - 120 / 676], [0, 0]], dtype=torch.float64)
    assert_close(s.grad, want, tolerance=1e-14)


@pytest.mark.parametrize(("shape", "dim"), CASES)
def test_equals_the_reference(impl: str, shape: tuple[int, ...], dim: int) -> None:
    s = torch.randn(shape, dtype=torch.float64)
    assert_all_close(
        value_and_gradients(partial(capsops.squash, dim=dim, impl=impl), [s]),
        value_and_gradients(partial(reference.squash, dim=dim), [s]),
    )


@pytest.mark.parametrize("n", [*range(1, 18), 24, 32, 48, 64, 256, 257])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_reference_for_any_number_of_rows(impl: str, n: int, dtype: torch.dtype) -> None:
    """On CPUs a register of rows is computed at a time."""
    for rows in (1, 3, 15, 16, 17, 33):
        s = torch.randn(rows, n, dtype=dtype)
        got = value_and_gradients(partial(capsops.squash, impl=impl), [s])
        want = value_and_gradients(reference.squash, [s.double()])
        for name, tensor in want.items():
            assert_close(got[name].double(), tensor, name, tolerance=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("n", [1, 4, 5, 8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_large_and_tiny_neighbours_change_nothing(impl: str, n: int, dtype: torch.dtype) -> None:
    """A row has the same bits beside rows whose squares overflow or underflow, and wherever it lies."""
    s, grad = torch.randn(37, n).to(dtype), torch.randn(37, n).to(dtype)
    function = partial(capsops.squash, impl=impl)
    clean = value_and_gradients(function, [s], grad)
    tiny, largest = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    broken, rows = s.clone(), torch.tensor([0, 5, 17, 18, 36])
    broken[rows] = torch.tensor([0, tiny, largest, NAN, -INF], dtype=dtype)[:, None].expand(5, n)
    others = torch.ones(37, dtype=torch.bool)
    others[rows] = False
    got = value_and_gradients(function, [broken], grad)
    later = value_and_gradients(function, [s[1:]], grad[1:])
    for name, tensor in clean.items():
        assert torch.equal(got[name][others], tensor[others]), name
        if impl != "reference":
            assert torch.equal(later[name], tensor[1:]), name
    assert (got["value"][0] == 0).all()
    assert (got["gradient 0"][0] == 0).all()


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("scale", [0.01, 1, 100])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((100, 8), 1),
        ((300, 8), 1),  # on CPUs 128 of these are converted at a time
        ((45, 64), 1),  # and 16 of these
        ((33, 17), 1),
        ((5, 16, 33), 1),
        ((3, 1000), 1),
        ((3, 1500), 1),
    ],
)
def test_low_precision(impl: str, shape: tuple[int, ...], dim: int, scale: float, dtype: torch.dtype) -> None:
    s = (torch.randn(shape) * scale).to(dtype)
    upstream = torch.randn(shape).to(dtype)
    assert_all_low_precision(
        value_and_gradients(partial(capsops.squash, dim=dim, impl=impl), [s], upstream),
        [value_and_gradients(partial(reference.squash, dim=dim), [s], upstream)],
        value_and_gradients(partial(reference.squash, dim=dim), [s.double()], upstream.double()),
    )


def test_length_grows_up_to_1(impl: str) -> None:
    """‖v‖ = r² / (1 + r²) over forty orders of magnitude, in float64 and float32."""
    for dtype, largest in ((torch.float64, 300), (torch.float32, 37)):
        r = torch.logspace(-18, largest, 200, dtype=torch.float64).to(dtype)
        direction = torch.tensor([2 / 3, -1 / 3, 2 / 3], dtype=dtype)
        length = capsops.squash(r[:, None] * direction, impl=impl).double().norm(dim=1)
        want = 1 / (1 + r.double() ** -2)
        assert ((length - want).abs() <= 8 * torch.finfo(dtype).eps * want).all()


@pytest.mark.parametrize("dim_size", [1, 3, 8, 16, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_the_largest_numbers_give_a_unit_vector(
    impl: str, dtype: torch.dtype, dim_size: int, fraction: float
) -> None:
    s = torch.full((17, dim_size), torch.finfo(dtype).max * fraction, dtype=dtype, requires_grad=True)
    v = capsops.squash(s, impl=impl)
    assert_close(v, torch.full_like(s, dim_size**-0.5), tolerance=8 * torch.finfo(dtype).eps)
    v.sum().backward()
    assert s.grad.abs().max() <= torch.finfo(dtype).tiny  # a difference of terms of the size of 1 / r


@pytest.mark.parametrize("inner", [2, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_numbers_beside_others_along_another_dim(
    impl: str, dtype: torch.dtype, inner: int
) -> None:
    """Column 0 is 0, column 1 and every third after it have numbers of order 1, the others the largest."""
    for n in (1, 3, 8, 16, 33):
        sign = torch.randn(n, inner, dtype=dtype).sign()
        s = sign * torch.finfo(dtype).max
        s[:, 1::3] = torch.randn(n, len(range(1, inner, 3)), dtype=dtype)
        s[:, 0] = 0
        got = value_and_gradients(partial(capsops.squash, dim=0, impl=impl), [s])
        want = value_and_gradients(partial(reference.squash, dim=0), [s.double()])
        want["value"] = torch.where(s.abs() == torch.finfo(dtype).max, sign * n**-0.5, want["value"])
        for name, tensor in want.items():
            assert_close(got[name].double(), tensor.double(), name, tolerance=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [1e-17, 1e17, 1e30])
def test_derivatives_where_the_square_overflows_or_underflows(impl: str, size: float, dim: int) -> None:
    """Value and gradient in float32, of any size, have the relative error of float32."""
    s = torch.randn(9, 7) * size
    got = value_and_gradients(partial(capsops.squash, dim=dim, impl=impl), [s])
    want = value_and_gradients(partial(reference.squash, dim=dim), [s.double()])
    for name, tensor in want.items():
        assert_close(got[name].double(), tensor, name, tolerance=1e-6, floor=0)


@pytest.mark.parametrize("size", [1e-20, 1e-30, 1e-38])
def test_tiny_vectors_underflow_without_nan(impl: str, size: float) -> None:
    """r² underflows in float32 before r does."""
    s = torch.full((17, 8), size, dtype=torch.float32, requires_grad=True)
    v = capsops.squash(s, impl=impl)
    assert v.abs().max() <= size
    v.sum().backward()
    # the Jacobian is f(r) + f′(r) r = 2 r along s
    assert_close(s.grad / size, torch.full_like(s, 2 * 8**0.5), tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim_size", [1, 3, 8, 16, 33])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_non_finite_values_neither_vanish_nor_spread(
    impl: str, bad: float, dim_size: int, dtype: torch.dtype
) -> None:
    s = torch.randn(35, dim_size).to(dtype)
    clean = capsops.squash(s, impl=impl)
    for row, column in ((0, 0), (17, dim_size // 2), (34, dim_size - 1)):
        broken = s.clone()
        broken[row, column] = bad
        v = capsops.squash(broken, impl=impl)
        assert not v[row].isfinite().all()
        v[row] = clean[row]
        assert torch.equal(v, clean)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("where", ["s", "grad"])
def test_gradient_of_non_finite_values(impl: str, where: str, bad: float) -> None:
    inputs = {"s": torch.randn(35, 8), "grad": torch.randn(35, 8)}
    inputs[where][17, 3] = bad
    s = inputs["s"].requires_grad_()
    capsops.squash(s, impl=impl).backward(inputs["grad"])
    finite = s.grad.isfinite().all(1)
    assert not finite[17]
    assert finite.sum() == 34


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 5)])
def test_empty_inputs(impl: str, shape: tuple[int, ...]) -> None:
    for dim in range(len(shape)):
        s = torch.zeros(shape, requires_grad=True)
        v = capsops.squash(s, dim, impl=impl)
        assert v.shape == shape
        v.sum().backward()
        assert s.grad.shape == shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("shape", "dim"), [((5, 33, 16), 2), ((17, 8), 1), ((4, 16, 7), 1)])
def test_memory_layout_changes_nothing(
    impl: str, shape: tuple[int, ...], dim: int, dtype: torch.dtype, layout: str
) -> None:
    s, upstream = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    function = partial(capsops.squash, dim=dim, impl=impl)
    arrange = LAYOUTS[layout]
    got = value_and_gradients(function, [arrange(s)], arrange(upstream))
    want = value_and_gradients(function, [arrange(s).contiguous()], arrange(upstream).contiguous())
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def test_input_is_not_changed(impl: str) -> None:
    s = torch.randn(5, 8)
    before = s.clone()
    v = capsops.squash(s, impl=impl)
    assert torch.equal(s, before)
    assert v.data_ptr() != s.data_ptr()


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_first_and_second_derivatives(impl: str, dim: int) -> None:
    s = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: capsops.squash(x, dim, impl=impl), s)
    assert torch.autograd.gradgradcheck(lambda x: capsops.squash(x, dim, impl=impl), s)


def test_second_derivatives_at_zero(impl: str) -> None:
    s = torch.randn(3, 4, dtype=torch.float64)
    s[1] = 0
    assert torch.autograd.gradcheck(lambda x: capsops.squash(x, impl=impl), s.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: capsops.squash(x, impl=impl), s)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_the_reference_computes_in_float32(dtype: torch.dtype) -> None:
    s = torch.randn(50, 16).to(dtype)
    assert torch.equal(capsops.squash(s, impl="reference"), reference.squash(s.float()).to(dtype))
