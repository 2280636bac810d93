"""squash_output=False: the result is s of the last pass, for a non-linearity other than squash."""

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, product

import pytest
import torch
from torch import Tensor

import capsops
from capsops import reference
from capsops.backends import BACKENDS
from capsops.backends.backend import NO_OPTIONS, UNSQUASHED
from tests.capsops.cases import ALL_OPTIONS, FEW_OPTIONS, Options, Shape, routing_inputs
from tests.capsops.compare import assert_close
from tests.capsops.routing_options import (
    SHAPES,
    Routing,
    assert_equals_the_formula,
    ours,
    plain,
    skip_unless_supported,
    tensors,
)
from tests.tiers import fast_only

OPS = ["capsule_routing", "dynamic_routing"]


@pytest.fixture
def supported(impl: str) -> None:
    skip_unless_supported(impl, frozenset((UNSQUASHED,)))


@pytest.mark.usefixtures("supported")
def test_by_hand(impl: str) -> None:
    """û = 1 and 2. T = 1: s = (1/2, 1), whose squash is (1/5, 1/2); the next logits are 1/5 and 1."""
    u_hat = torch.tensor([1.0, 2.0]).double().view(1, 1, 2, 1)
    second = torch.tensor([1 / 5, 1.0], dtype=torch.float64).softmax(0) * u_hat.flatten()
    for iterations, want in ((0, [1, 2]), (1, [1 / 2, 1]), (2, second.tolist())):
        s = capsops.dynamic_routing(u_hat, iterations=iterations, squash_output=False, impl=impl)
        assert_close(s.flatten(), torch.tensor(want, dtype=torch.float64), tolerance=1e-15)


FAST = [
    (shape, Routing(options, squash_output=False))
    for shape, options in zip(SHAPES * 2, cycle(FEW_OPTIONS), strict=False)
]
EVERY = [
    (shape, Routing(options, squash_output=False))
    for shape, options in product([Shape(5, 9, 3, 4, 2), Shape(17, 6, 10, 16, 8)], ALL_OPTIONS)
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("shape", "routing"), [*FAST, *fast_only(EVERY[::7], EVERY)], ids=str)
def test_equals_the_formula(impl: str, shape: Shape, routing: Routing, op: str) -> None:
    assert_equals_the_formula(op, impl, shape, routing)


@pytest.mark.usefixtures("supported")
@pytest.mark.parametrize("options", FEW_OPTIONS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_squashed_it_is_the_other_result(impl: str, op: str, options: Options) -> None:
    inputs = tensors(op, Shape(17, 9, 3, 16, 8), Routing(options))
    s = ours(op, impl, Routing(options, squash_output=False))(*inputs)
    assert_close(reference.squash(s), ours(op, impl, Routing(options))(*inputs))
    assert s.norm(dim=-1).max() > 1


@pytest.mark.usefixtures("supported")
@pytest.mark.parametrize("options", FEW_OPTIONS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_second_gradients(impl: str, op: str, options: Options) -> None:
    routing = Routing(options, squash_output=False)
    first, *others = tensors(op, Shape(5, 9, 3, 4, 2), routing)

    def penalty(function: Callable[..., Tensor]) -> Tensor:
        leaf = first.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf, *others).sin().sum(), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    assert_close(penalty(ours(op, impl, routing)), penalty(plain(op, routing)), tolerance=1e-11)


@pytest.mark.usefixtures("supported")
def test_it_shares_no_memory_with_the_saved_sums(impl: str) -> None:
    args = (
        *routing_inputs(Shape(2, 3, 4, 5, 1), dtype=torch.float32),
        None,
        None,
        2,
        False,
        False,
        False,
        impl,
    )
    v, s = torch.ops.capsops.dynamic_routing(*args)
    assert torch.equal(v, s[-1])
    assert v.data_ptr() != s[-1].data_ptr()


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_without_it_says_so(name: str) -> None:
    here = replace(
        BACKENDS[name], dtypes=(torch.float32,), functions={"capsule_routing": print}, options=NO_OPTIONS
    )
    assert here.why_declined("capsule_routing", torch.float32, NO_OPTIONS) == ""
    reason = here.why_declined("capsule_routing", torch.float32, frozenset((UNSQUASHED,)))
    assert reason == f"impl={name!r} does not support squash_output=False"
