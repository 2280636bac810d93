"""All options of routing together; those of a single option are in the test file of its name."""

from itertools import product

import pytest
import torch
from torch import Tensor

import capsops
from capsops import reference
from capsops.backends import BACKENDS
from capsops.backends.backend import ALL_OPTIONS, LOGITS, MASK, SHARED
from tests.capsops import cases
from tests.capsops.cases import LOW_PRECISION, Options, Shape, runs_in_other_orders, value_and_gradients
from tests.capsops.compare import assert_all_low_precision, assert_close, assert_low_precision
from tests.capsops.routing_options import (
    LOGITS_AXES,
    SHAPES,
    Routing,
    assert_equals_the_formula,
    assert_same_results,
    axes_of_inputs,
    ours,
    plain,
    skip_unless_supported,
    tensors,
    wide,
)
from tests.tiers import fast_only

OPS = ["capsule_routing", "dynamic_routing"]


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_kernels_support_every_option(name: str) -> None:
    """So that no test of an option is skipped for a backend that could compute it."""
    assert BACKENDS[name].options >= ALL_OPTIONS


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_a_backend_without_an_option_declines_it(name: str) -> None:
    backend = BACKENDS[name]
    if backend.unavailable:
        pytest.skip(backend.unavailable)
    for option in ALL_OPTIONS - backend.options:
        reason = backend.why_declined("capsule_routing", torch.float32, frozenset((option,)))
        assert reason == f"impl={name!r} does not support {option}"


COMBINATIONS = [
    (shape, Routing(options, logits, closed, mask, shared, squash_output))
    for shape, options, logits, closed, mask, shared, squash_output in product(
        [Shape(5, 9, 3, 4, 2), Shape(17, 6, 10, 16, 8), Shape(2, 33, 1, 5, 3)],
        cases.ALL_OPTIONS,
        [None, "J", "IJ", "BI1", "BIJ"],
        *[(False, True)] * 4,
    )
    if logits or not closed
][::7]
FEW_COMBINATIONS = COMBINATIONS[::13]
# In shapes that fill nothing evenly.
OTHER_SHAPES = [
    (shape, COMBINATIONS[(n * 211 + 53) % len(COMBINATIONS)][1]) for n, shape in enumerate(SHAPES * 2)
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("shape", "routing"), [*fast_only(FEW_COMBINATIONS, COMBINATIONS), *OTHER_SHAPES], ids=str
)
def test_combinations_equal_the_formula(impl: str, shape: Shape, routing: Routing, op: str) -> None:
    assert_equals_the_formula(op, impl, shape, routing)


@pytest.mark.parametrize(("shape", "routing"), OTHER_SHAPES, ids=str)
def test_couplings_equal_the_formula(impl: str, shape: Shape, routing: Routing) -> None:
    skip_unless_supported(impl, routing.used(), torch.float64)
    u, weight, bias, logits, mask = tensors("capsule_routing", shape, routing)
    iterations, leaky, *_ = routing.options
    keywords = {"logits": logits, "mask": mask, "iterations": iterations, "leaky": leaky}
    c = capsops.couplings(u, weight, bias, impl=impl, **keywords)
    assert_close(c, reference.couplings(u, weight, bias, **keywords))


LOW_PRECISION_ROUTINGS = [
    Routing(Options(3, bias=True), "IJ"),
    Routing(Options(2, leaky=True), "BIJ", closed=True),
    Routing(Options(3), mask=True),
    Routing(Options(3, bias=True), shared=True),
    Routing(Options(0, bias=True), shared=True, squash_output=False),
    Routing(Options(2, True, True, True), "J", False, True, True, False),
    Routing(Options(3, bias=True), "BI1", True, True, True),
]


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("routing", LOW_PRECISION_ROUTINGS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_low_precision(impl: str, op: str, routing: Routing, dtype: torch.dtype) -> None:
    skip_unless_supported(impl, routing.used(), dtype)
    shape = Shape(17, 33, 10, 16, 8)
    inputs = tensors(op, shape, routing, dtype)
    upstream = torch.randn(shape.B, shape.J, shape.D).to(dtype)
    assert_all_low_precision(
        value_and_gradients(ours(op, impl, routing), inputs, upstream),
        runs_in_other_orders(plain(op, routing), inputs, axes_of_inputs(op, routing), upstream),
        value_and_gradients(plain(op, routing), wide(inputs), upstream.double()),
    )


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("routing", LOW_PRECISION_ROUTINGS[-2:], ids=str)
def test_couplings_in_low_precision(impl: str, routing: Routing, dtype: torch.dtype) -> None:
    skip_unless_supported(impl, routing.used(), dtype)
    iterations, leaky, *_ = routing.options

    def couplings(function: object, *inputs: Tensor | None, **impl: str) -> Tensor:
        u, weight, bias, logits, mask = inputs
        return function(u, weight, bias, logits=logits, mask=mask, iterations=iterations, leaky=leaky, **impl)

    inputs = tensors("capsule_routing", Shape(17, 33, 10, 16, 8), routing, dtype)
    assert_low_precision(
        couplings(capsops.couplings, *inputs, impl=impl),
        [couplings(reference.couplings, *inputs)],
        couplings(reference.couplings, *wide(inputs)),
        factor=2,
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [Shape(5, 9, 3, 5, 3), Shape(17, 33, 10, 16, 8), Shape(2, 7, 60, 32, 4)], ids=str
)
@pytest.mark.parametrize("op", OPS)
def test_every_element_is_written(impl: str, op: str, shape: Shape, dtype: torch.dtype) -> None:
    skip_unless_supported(impl, dtype=dtype)
    for routing in LOW_PRECISION_ROUTINGS:
        inputs = tensors(op, shape, routing, dtype)
        for name, tensor in value_and_gradients(ours(op, impl, routing), inputs).items():
            assert tensor.isfinite().all(), (routing, name)


@pytest.mark.parametrize("iterations", range(4))
@pytest.mark.parametrize(
    "shape", [Shape(3, 1, 1, 4, 2), Shape(3, 5, 1, 4, 2), Shape(17, 1, 2, 1, 1)], ids=str
)
@pytest.mark.parametrize("op", OPS)
def test_one_input_or_output_capsule(impl: str, op: str, shape: Shape, iterations: int) -> None:
    """The softmax of one logit is 1, but for a closed pair; nothing is skipped where logits are given."""
    for leaky, squash_output in product((False, True), repeat=2):
        routing = Routing(Options(iterations, leaky, bias=True), "BIJ", True, True, True, squash_output)
        assert_equals_the_formula(op, impl, shape, routing)


def test_interests_of_a_recommender(impl: str) -> None:
    """Li et al. 2019 (MIND): each user is routed as if it were the only one.

    There is one matrix, the random logits are fixed, and the longer a user's sequence, the more interests.
    """
    options = frozenset((LOGITS, MASK, SHARED))
    skip_unless_supported(impl, options, torch.float64)
    users, length, interests, dim = 5, 20, 4, 8
    items, matrix = torch.randn(users, length, 6).double(), torch.randn(dim, 6).double()
    start = torch.randn(length, interests).double()
    lengths, kept = torch.tensor([20, 7, 1, 12, 3]), torch.tensor([4, 2, 1, 3, 1])
    mask = torch.arange(length) < lengths[:, None]
    closed = torch.where(torch.arange(interests) < kept[:, None], 0.0, -torch.inf).double()[:, None]

    def together(items: Tensor, matrix: Tensor, start: Tensor) -> Tensor:
        return capsops.dynamic_routing(items @ matrix.T, logits=start + closed, mask=mask, impl=impl)

    def one_by_one(items: Tensor, matrix: Tensor, start: Tensor) -> Tensor:
        rows = []
        for user, (n, k) in enumerate(zip(lengths.tolist(), kept.tolist(), strict=True)):
            u_hat = (items[user, :n] @ matrix.T)[None, :, None].expand(1, n, k, dim)
            v = reference.dynamic_routing(u_hat, logits=start[:n, :k])
            rows.append(torch.nn.functional.pad(v, (0, 0, 0, interests - k)))
        return torch.cat(rows)

    inputs = [items, matrix, start]
    got, want = (value_and_gradients(function, inputs) for function in (together, one_by_one))
    for name, tensor in want.items():
        assert_close(got[name], tensor, name, floor=1)


@pytest.mark.parametrize("axes", LOGITS_AXES)
@pytest.mark.parametrize("op", OPS)
def test_gradients_do_not_depend_on_the_batch(impl: str, op: str, axes: str) -> None:
    """Samples do not affect one another, whatever axes they share."""
    routing = Routing(Options(3, leaky=True, bias=True), axes, True, True, True)
    skip_unless_supported(impl, routing.used(), torch.float64)
    first, weight, bias, logits, mask = tensors(op, Shape(33, 7, 5, 4, 3), routing)
    whole = value_and_gradients(ours(op, impl, routing), [first, weight, bias, logits, mask], torch.ones_like)
    for part in (slice(0, 1), slice(15, 18), slice(32, 33)):
        start = logits[part] if axes.startswith("B") else logits
        inputs = [first[part], weight, bias, start, mask[part]]
        got = value_and_gradients(ours(op, impl, routing), inputs, torch.ones_like)
        assert_close(got["value"], whole["value"][part])
        assert_close(got["gradient 0"], whole["gradient 0"][part])
        if axes.startswith("B"):
            assert_close(got["gradient 3"], whole["gradient 3"][part], floor=1)


@pytest.mark.parametrize("op", OPS)
def test_a_deep_copy_of_the_inputs_gives_the_same(impl: str, op: str) -> None:
    """No call changes its inputs."""
    routing = Routing(Options(3, leaky=True, bias=True), "BIJ", True, True, True, False)
    skip_unless_supported(impl, routing.used(), torch.float64)
    inputs = tensors(op, Shape(17, 7, 5, 4, 3), routing)
    copies = [x if x is None else x.clone() for x in inputs]
    want = value_and_gradients(ours(op, impl, routing), inputs)
    assert all(x is None or torch.equal(x, y) for x, y in zip(inputs, copies, strict=True))
    assert_same_results(value_and_gradients(ours(op, impl, routing), copies), want, tolerance=0)
