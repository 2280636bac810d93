"""Masks of routing: absent input capsules, such as the padding of a sequence."""

from collections.abc import Callable
from itertools import cycle, product

import pytest
import torch
from torch import Tensor

import capsops
from capsops import reference
from capsops.backends.backend import LOGITS, MASK
from tests.capsops.cases import ALL_OPTIONS, FEW_OPTIONS, LAYOUTS, Options, Shape, value_and_gradients
from tests.capsops.compare import assert_close
from tests.capsops.routing_options import (
    CLOSED,
    EMPTY_SHAPES,
    SHAPES,
    Inputs,
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
    skip_unless_supported(impl, frozenset((MASK,)))


def test_by_hand(impl: str) -> None:
    """The first input capsule has û = 1 for both outputs, c = 1/2, v = 1/5; the second is absent."""
    u_hat = float64(1, 1, torch.nan, torch.inf).view(1, 2, 2, 1)
    mask = torch.tensor([[True, False]])
    for iterations, want in ((0, 1 / 2), (1, 1 / 5), (3, 1 / 5)):
        v = capsops.dynamic_routing(u_hat, mask=mask, iterations=iterations, impl=impl)
        assert_close(v.flatten(), float64(want, want), tolerance=1e-15)
    c = capsops.couplings(
        float64(1, torch.nan).view(1, 2, 1), torch.ones(2, 2, 1, 1).double(), mask=mask, impl=impl
    )
    assert torch.equal(c, float64(0.5, 0.5, 0, 0).view(1, 2, 2))


FAST = [
    (shape, Routing(options, mask=True))
    for shape, options in zip(SHAPES * 2, cycle(FEW_OPTIONS), strict=False)
]
EVERY = [
    (shape, Routing(options, mask=True))
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
    u, weight, bias, _, mask = tensors("capsule_routing", shape, routing)
    keywords = {"mask": mask, "iterations": routing.options.iterations, "leaky": routing.options.leaky}
    c = capsops.couplings(u, weight, bias, impl=impl, **keywords)
    assert_close(c, reference.couplings(u, weight, bias, **keywords))
    assert (c[~mask] == 0).all()


def among_the_present(routing: Routing) -> Callable[..., Tensor]:
    """The formula, sample by sample, of the input capsules that are present."""

    def function(
        first: Tensor, weight: Tensor | None, bias: Tensor | None, logits: Tensor | None, mask: Tensor
    ) -> Tensor:
        if logits is not None:
            logits = logits.expand(*mask.shape, -1)
        rows = []
        for b, present in enumerate(mask):
            of_sample: Inputs = [
                first[b : b + 1, present],
                None if weight is None else weight[present],
                bias,
                None if logits is None else logits[b : b + 1, present],
                None,
            ]
            rows.append(
                plain("dynamic_routing" if weight is None else "capsule_routing", routing)(*of_sample)
            )
        return torch.cat(rows)

    return function


# One output capsule, all couplings 1, one input capsule; sequences that fill nothing evenly.
PRESENT_SHAPES = [Shape(5, 9, 3, 4, 2), Shape(17, 7, 1, 8, 3), Shape(4, 1, 5, 3, 2), Shape(3, 33, 11, 16, 8)]


@pytest.mark.parametrize("axes", [None, "IJ"])
@pytest.mark.parametrize(
    "options",
    [Options(0, bias=True), Options(1, leaky=True), Options(2, detach=True), Options(3, bias=True)],
    ids=str,
)
@pytest.mark.parametrize("shape", PRESENT_SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_only_the_capsules_that_are_present_are_routed(
    impl: str, op: str, shape: Shape, options: Options, axes: str | None
) -> None:
    routing = Routing(options, axes, mask=True)
    skip_unless_supported(impl, routing.used())
    inputs = tensors(op, shape, routing)
    assert_same_results(
        value_and_gradients(ours(op, impl, routing), inputs),
        value_and_gradients(among_the_present(routing), inputs),
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("shape", [Shape(5, 9, 3, 4, 2), Shape(17, 7, 1, 8, 8)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_values_of_absent_capsules_have_no_effect(
    impl: str, op: str, shape: Shape, iterations: int, closed: bool, bad: float
) -> None:
    """Nor have their logits; their gradients are exactly 0, and so are those of their logits."""
    routing = Routing(Options(iterations, bias=True), "BIJ", closed, mask=True)
    skip_unless_supported(impl, routing.used())
    inputs = tensors(op, shape, routing)
    first, mask = inputs[0], inputs[4]
    want = value_and_gradients(ours(op, impl, routing), inputs)
    inputs[0] = torch.where(mask[(...,) + (None,) * (first.dim() - 2)], first, bad)
    got = value_and_gradients(ours(op, impl, routing), inputs)
    for name, tensor in want.items():
        assert tensor.isfinite().all(), name
        assert torch.equal(got[name], tensor), name
    assert (got["gradient 0"][~mask] == 0).all()
    assert (got["gradient 3"][~mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_nan_of_absent_capsules_has_no_effect_in_low_precision(
    impl: str, op: str, dtype: torch.dtype
) -> None:
    routing = Routing(Options(3, leaky=True), mask=True)
    inputs = tensors(op, Shape(17, 33, 10, 16, 8), routing, dtype)
    want = value_and_gradients(ours(op, impl, routing), inputs)
    mask = inputs[4]
    inputs[0] = inputs[0].masked_fill(~mask[(...,) + (None,) * (inputs[0].dim() - 2)], torch.nan)
    for name, tensor in value_and_gradients(ours(op, impl, routing), inputs).items():
        assert torch.equal(tensor, want[name]), name


@pytest.mark.parametrize("iterations", range(4))
@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_all_capsules_absent(impl: str, op: str, leaky: bool, iterations: int) -> None:
    """s is the bias."""
    routing = Routing(Options(iterations, leaky, bias=True), mask=True)
    inputs = tensors(op, Shape(5, 9, 3, 4, 2), routing)
    inputs[0], inputs[4] = torch.full_like(inputs[0], torch.nan), torch.zeros(5, 9, dtype=torch.bool)
    got = value_and_gradients(ours(op, impl, routing), inputs)
    want = value_and_gradients(lambda bias: reference.squash(bias).expand(5, 3, 4), [inputs[2]])
    assert_close(got.pop("value"), want["value"])
    assert_close(got.pop("gradient 2"), want["gradient 0"])
    assert all(torch.equal(x, torch.zeros_like(x)) for x in got.values())


@pytest.mark.parametrize("op", OPS)
def test_a_mask_of_true_changes_nothing(impl: str, op: str) -> None:
    routing = Routing(Options(3, bias=True))
    inputs = tensors(op, Shape(17, 9, 3, 16, 8), routing)
    want = value_and_gradients(ours(op, impl, routing), inputs)
    inputs[4] = torch.ones(17, 9, dtype=torch.bool)
    assert_same_results(value_and_gradients(ours(op, impl, routing), inputs), want)


@pytest.mark.parametrize("op", OPS)
def test_views_of_a_mask(impl: str, op: str) -> None:
    """A row for all samples, a column for all input capsules, every second element, and transposed."""
    routing = Routing(Options(3), mask=True)
    inputs = tensors(op, Shape(17, 9, 3, 16, 8), routing)
    mask = inputs[4]
    for view in (
        mask[1:2].expand(17, 9),
        mask[:, :1].expand(17, 9),
        mask.T.contiguous().T,
        mask.repeat_interleave(2, 1)[:, ::2],
    ):
        got = value_and_gradients(ours(op, impl, routing), [*inputs[:4], view])
        want = value_and_gradients(ours(op, impl, routing), [*inputs[:4], view.contiguous()])
        for name, tensor in want.items():
            assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_changes_nothing(impl: str, layout: str) -> None:
    inputs = tensors("capsule_routing", Shape(17, 5, 3, 16, 8), Routing(Options(3, bias=True), mask=True))
    strided = [x if x is None else LAYOUTS[layout](x) for x in inputs[:4]]
    contiguous = [x if x is None else x.contiguous() for x in strided]
    function = ours("capsule_routing", impl, Routing(Options(3)))
    got, want = (value_and_gradients(function, [*each, inputs[4]]) for each in (strided, contiguous))
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("options", [Options(0), Options(1, leaky=True), Options(2, bias=True)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_derivatives(impl: str, op: str, options: Options) -> None:
    """The first sample has no input capsules, so that s is 0 or the bias."""
    routing = Routing(options, mask=True)
    first, weight, bias, _, _ = tensors(op, Shape(2, 3, 2, 2, 2), routing)
    mask = torch.tensor([[False, False, False], [True, False, True]])
    assert_derivatives(ours(op, impl, routing), [first, weight, bias, None, mask])


@pytest.mark.parametrize("iterations", [0, 3])
@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_empty_inputs(impl: str, op: str, shape: Shape, iterations: int) -> None:
    routing = Routing(Options(iterations, bias=True), mask=True)
    inputs = tensors(op, shape, routing)
    assert_same_results(
        value_and_gradients(ours(op, impl, routing), inputs), value_and_gradients(plain(op, routing), inputs)
    )


def test_a_closed_row_is_an_absent_capsule(impl: str) -> None:
    """Logits of −inf for all its pairs, but for its value, which has to be finite."""
    skip_unless_supported(impl, frozenset((LOGITS, MASK)))
    routing = Routing(Options(3, bias=True), mask=True)
    inputs = tensors("capsule_routing", Shape(17, 9, 3, 16, 8), routing)
    mask = inputs[4]
    closed = torch.where(mask, 0.0, CLOSED).double()[..., None]
    got = value_and_gradients(ours("capsule_routing", impl, routing), [*inputs[:3], closed, None])
    want = value_and_gradients(ours("capsule_routing", impl, routing), inputs)
    for name, tensor in want.items():
        assert_close(got[name], tensor, name)
