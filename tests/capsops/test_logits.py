"""Starting logits of routing: of any shape that is broadcast to [B, I, J], and −inf for closed pairs."""

import math
from collections.abc import Callable
from itertools import cycle, product

import pytest
import torch
from torch import Tensor

import capsops
from capsops import reference
from capsops.backends.backend import LOGITS, UNSQUASHED
from tests.capsops.cases import ALL_OPTIONS, FEW_OPTIONS, Options, Shape, layer_inputs, value_and_gradients
from tests.capsops.compare import assert_close
from tests.capsops.routing_options import (
    CLOSED,
    EMPTY_SHAPES,
    LOGITS_AXES,
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
    skip_unless_supported(impl, frozenset((LOGITS,)))


def test_by_hand(impl: str) -> None:
    """û = 1 and 2, ℓ = 0 and log 3. Pass 1: c = 1/4 and 3/4, s = (1/4, 3/2), v = (1/17, 9/13)."""
    u_hat, logits = float64(1, 2).view(1, 1, 2, 1), float64(0, math.log(3))
    second = float64(1 / 17, math.log(3) + 2 * 9 / 13).softmax(0) * float64(1, 2)
    for iterations, s in ((0, float64(1, 2)), (1, float64(1 / 4, 3 / 2)), (2, second)):
        v = capsops.dynamic_routing(u_hat, logits=logits, iterations=iterations, impl=impl)
        assert_close(v.flatten(), s**2 / (1 + s**2), f"T = {iterations}", tolerance=1e-14)
    weight = u_hat.view(1, 2, 1, 1)
    for iterations, c in ((0, [1, 1]), (1, [1 / 4, 3 / 4])):
        got = capsops.couplings(
            torch.ones(1, 1, 1).double(), weight, logits=logits, iterations=iterations, impl=impl
        )
        assert_close(got.flatten(), float64(*c), tolerance=1e-14)


def test_gradient_by_hand(impl: str) -> None:
    """As above, L = s_1 + s_2: ∂L/∂ℓ_j = c_j (û_j − Σ_k c_k û_k), where the sum is 1/4 + 3/2 = 7/4."""
    skip_unless_supported(impl, frozenset((LOGITS, UNSQUASHED)))
    logits = float64(0, math.log(3)).requires_grad_()
    s = capsops.dynamic_routing(
        float64(1, 2).view(1, 1, 2, 1), logits=logits, iterations=1, squash_output=False, impl=impl
    )
    s.sum().backward()
    assert_close(logits.grad, float64(-3 / 16, 3 / 16), tolerance=1e-14)


def test_closed_pairs_by_hand(impl: str) -> None:
    """û = 1 and 2, ℓ = 0 and −inf: c = 1 and 0, v = (1/2, 0); leaky, c = 1/2, v = (1/5, 0)."""
    u_hat = float64(1, 2).view(1, 1, 2, 1)
    logits = float64(0, CLOSED)
    for iterations, leaky, first in (
        (0, False, 1 / 2),
        (1, False, 1 / 2),
        (3, False, 1 / 2),
        (1, True, 1 / 5),
    ):
        v = capsops.dynamic_routing(u_hat, logits=logits, iterations=iterations, leaky=leaky, impl=impl)
        assert_close(v.flatten(), float64(first, 0), tolerance=1e-15)
    for iterations, leaky in product(range(4), (False, True)):
        v = capsops.dynamic_routing(
            u_hat, logits=float64(CLOSED), iterations=iterations, leaky=leaky, impl=impl
        )
        assert torch.equal(v, torch.zeros_like(v))


def cases(options: list[Options]) -> list[tuple[Shape, Routing]]:
    """Every shape with logits of all axes, every other time with closed pairs."""
    several = cycle(product(options, (False, True)))
    return [
        (shape, Routing(some, axes, closed))
        for (shape, axes), (some, closed) in zip(product(SHAPES, LOGITS_AXES), several, strict=False)
    ]


FAST = cases(FEW_OPTIONS)
EVERY = [
    (shape, Routing(options, axes, closed))
    for shape, axes, options, closed in product(
        [Shape(5, 9, 3, 4, 2), Shape(17, 6, 10, 16, 8), Shape(3, 5, 1, 3, 2)],
        LOGITS_AXES,
        ALL_OPTIONS,
        (False, True),
    )
][::3]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("shape", "routing"), [*FAST, *fast_only(EVERY[::31], EVERY)], ids=str)
def test_equals_the_formula(impl: str, shape: Shape, routing: Routing, op: str) -> None:
    assert_equals_the_formula(op, impl, shape, routing)


@pytest.mark.parametrize(("shape", "routing"), FAST[::3], ids=str)
def test_couplings_equal_the_formula(impl: str, shape: Shape, routing: Routing) -> None:
    u, weight, bias, logits, _ = tensors("capsule_routing", shape, routing)
    keywords = {"logits": logits, "iterations": routing.options.iterations, "leaky": routing.options.leaky}
    c = capsops.couplings(u, weight, bias, impl=impl, **keywords)
    assert_close(c, reference.couplings(u, weight, bias, **keywords))
    assert (c[(logits == CLOSED).expand_as(c)] == 0).all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("iterations", range(4))
@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize(
    "shape", [Shape(5, 9, 3, 4, 2), Shape(17, 6, 1, 8, 4), Shape(2, 9, 40, 4, 2)], ids=str
)
def test_closed_pairs_have_no_gradient(
    impl: str, shape: Shape, leaky: bool, iterations: int, op: str
) -> None:
    """Nor has an input capsule whose pairs are all closed, such as the first one of the first sample."""
    routing = Routing(Options(iterations, leaky), "BIJ", closed=True)
    inputs = tensors(op, shape, routing)
    closed = inputs[3] == CLOSED
    assert closed[0, 0].all()
    assert not closed.all()
    results = value_and_gradients(ours(op, impl, routing), inputs)
    assert all(x.isfinite().all() for x in results.values())
    assert (results["gradient 3"][closed] == 0).all()
    first = results["gradient 0"]
    if first.dim() == 4:
        assert (first[closed] == 0).all()
    else:
        assert (first[closed.all(-1)] == 0).all()


@pytest.mark.parametrize("iterations", range(4))
@pytest.mark.parametrize("leaky", [False, True])
def test_fewer_output_capsules_for_some_samples(impl: str, leaky: bool, iterations: int) -> None:
    """Sample b has b + 1 of 5 output capsules: it is routed among only those, and the others are 0."""
    B, I, J = 5, 9, 5  # noqa: E741
    u, weight, _ = layer_inputs(Shape(B, I, J, 4, 3))
    start = torch.randn(I, J, dtype=torch.float64)
    options = Routing(Options(iterations, leaky), "BIJ")

    def all_together(u: Tensor, weight: Tensor, start: Tensor) -> Tensor:
        closed = torch.arange(J) > torch.arange(B)[:, None]
        logits = torch.where(closed[:, None], CLOSED, start)
        return ours("capsule_routing", impl, options)(u, weight, None, logits)

    def one_by_one(u: Tensor, weight: Tensor, start: Tensor) -> Tensor:
        rows = [
            plain("capsule_routing", options)(u[b : b + 1], weight[:, : b + 1], None, start[:, : b + 1])
            for b in range(B)
        ]
        return torch.cat([torch.nn.functional.pad(row, (0, 0, 0, J - row.shape[1])) for row in rows])

    got, want = (value_and_gradients(each, [u, weight, start]) for each in (all_together, one_by_one))
    for name, tensor in want.items():
        assert_close(got[name], tensor, name, floor=1)


@pytest.mark.parametrize("op", OPS)
def test_equal_logits_change_nothing(impl: str, op: str) -> None:
    """A softmax subtracts them; with an orphan class only zeros are nothing."""
    shape = Shape(5, 9, 3, 4, 2)
    for options, start in ((Options(3), 0.7), (Options(3, leaky=True), 0.0), (Options(0), -2.0)):
        first, weight, bias, _, _ = tensors(op, shape, Routing(options))
        got = ours(op, impl, Routing(options))(first, weight, bias, float64(start))
        assert_close(got, plain(op, Routing(options))(first, weight, bias))


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_logits(impl: str, dtype: torch.dtype, iterations: int) -> None:
    """Of the largest finite numbers, the softmax is all or nothing; −max is not −inf."""
    largest = torch.finfo(dtype).max
    u_hat = torch.randn(5, 4, 3, 2, dtype=dtype)
    logits = torch.tensor([-largest, largest, 0], dtype=dtype)
    got = value_and_gradients(
        lambda x, start: capsops.dynamic_routing(x, logits=start, iterations=iterations, impl=impl),
        [u_hat, logits],
    )
    assert all(x.isfinite().all() for x in got.values())
    s = u_hat.sum(1) * (torch.tensor([[0], [1], [0]], dtype=dtype) if iterations else 1)
    assert_close(got["value"], reference.squash(s), tolerance=4 * torch.finfo(dtype).eps)
    low = torch.full((3,), -largest, dtype=dtype)
    c = capsops.couplings(
        torch.zeros(1, 1, 2, dtype=dtype), torch.zeros(1, 3, 2, 2, dtype=dtype), logits=low, impl=impl
    )
    assert_close(c, torch.full_like(c, 1 / 3), tolerance=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("axes", LOGITS_AXES)
@pytest.mark.parametrize("op", OPS)
def test_views_of_logits(impl: str, op: str, axes: str) -> None:
    """Expanded, transposed and sliced: the same numbers in another order of memory."""
    shape = Shape(17, 6, 5, 4, 3)
    routing = Routing(Options(3, leaky=True), axes)
    inputs = tensors(op, shape, routing)
    function = ours(op, impl, routing)
    want = value_and_gradients(function, inputs)
    logits = inputs[3]
    expanded = value_and_gradients(function, [*inputs[:3], logits.expand(17, 6, 5)])
    assert_close(expanded["value"], want["value"])
    assert_close(expanded["gradient 3"].sum_to_size(logits.shape), want["gradient 3"])
    views: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        lambda x: torch.stack([torch.full_like(x, torch.nan), x], -1)[..., 1],
        lambda x: (
            torch.full((*x.shape, 3), torch.nan, dtype=x.dtype)
            .movedim(-1, 0)
            .index_put((torch.tensor(1),), x)[1]
        ),
    ]
    for view in views:
        got = value_and_gradients(function, [*inputs[:3], view(logits)])
        for name, tensor in want.items():
            assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("op", OPS)
def test_gradients_of_some_inputs_only(impl: str, op: str, needs: tuple[bool, bool]) -> None:
    first, logits = needs
    routing = Routing(Options(2, bias=True), "IJ")
    inputs = tensors(op, Shape(5, 9, 3, 16, 8), routing)
    wanted = (first, False, False, logits, False)
    assert_same_results(
        value_and_gradients(ours(op, impl, routing), inputs, needs=wanted),
        value_and_gradients(plain(op, routing), inputs, needs=wanted),
    )


DERIVATIVES = [
    *(Options(T, bias=True) for T in range(3)),
    Options(2, leaky=True),
]


@pytest.mark.parametrize("options", DERIVATIVES, ids=str)
@pytest.mark.parametrize("axes", ["J", "BIJ"])
@pytest.mark.parametrize("op", OPS)
def test_derivatives_with_closed_pairs(impl: str, op: str, axes: str, options: Options) -> None:
    """Where s is 0 in the first sample and pairs are closed."""
    routing = Routing(options, axes, closed=True)
    first, weight, bias, logits, _ = tensors(op, Shape(2, 3, 2, 2, 2), routing)
    first[0] = 0
    if axes == "J":
        logits = float64(0.3, CLOSED)
    if bias is not None:
        bias[0] = 0
    assert_derivatives(ours(op, impl, routing), [first, weight, bias, logits])


@pytest.mark.parametrize("options", [Options(T, detach=True, bias=True) for T in (1, 2, 3)], ids=str)
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("axes", ["J", "IJ", "BIJ"])
@pytest.mark.parametrize("op", OPS)
def test_second_gradients_with_detach(impl: str, op: str, axes: str, closed: bool, options: Options) -> None:
    """Of a gradient penalty of all inputs. Finite differences would see the passes that are detached."""
    routing = Routing(options, axes, closed)
    inputs = tensors(op, Shape(5, 9, 3, 4, 2), routing)

    def penalty(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x if x is None else x.clone().requires_grad_() for x in inputs]
        present = [x for x in leaves if x is not None]
        gradients = torch.autograd.grad(function(*leaves).sin().sum(), present, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in gradients), present, materialize_grads=True)

    got, want = penalty(ours(op, impl, routing)), penalty(plain(op, routing))
    for n, (x, y) in enumerate(zip(got, want, strict=True)):
        assert_close(x, y, f"gradient {n}", tolerance=1e-11)
    attached = penalty(plain(op, Routing(options._replace(detach=False), axes, closed)))
    assert options.iterations == 1 or (attached[-1] - want[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("iterations", [0, 3])
@pytest.mark.parametrize("axes", ["", "IJ", "BIJ"])
@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_empty_inputs(impl: str, op: str, shape: Shape, axes: str, iterations: int) -> None:
    routing = Routing(Options(iterations, bias=True), axes)
    inputs = tensors(op, shape, routing)
    got = value_and_gradients(ours(op, impl, routing), inputs)
    assert_same_results(got, value_and_gradients(plain(op, routing), inputs))
    for n in range(4):
        assert n == 1 or got[f"gradient {n}"].shape == inputs[n].shape
