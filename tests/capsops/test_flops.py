"""torch.utils.flop_counter counts as many operations for the ops as for the plain formula."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import capsops
from capsops import reference

B, I, J, D, K = 2, 30, 10, 16, 8  # noqa: E741


def count_flops(op: object, *inputs: Tensor, **options: object) -> tuple[int, int]:
    """Operations of the forward and of the backward pass."""
    with FlopCounterMode(display=False) as forward:
        result = op(*inputs, **options)
    with FlopCounterMode(display=False) as backward:
        if result.requires_grad:
            result.square().sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def layer(needs_u: bool = True, needs_weight: bool = True) -> tuple[Tensor, Tensor]:
    u, weight = torch.randn(B, I, K), torch.randn(I, J, D, K)
    return u.requires_grad_(needs_u), weight.requires_grad_(needs_weight)


def test_a_capsule_layer() -> None:
    for detach, backward in ((False, 480_000), (True, 326_400)):
        assert count_flops(capsops.capsule_routing, *layer(), detach=detach) == (249_600, backward)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_routing_counts_like_the_formula(iterations: int, leaky: bool, detach: bool, impl: str) -> None:
    options = {"iterations": iterations, "leaky": leaky, "detach": detach}
    u_hat = torch.randn(B, I, J, D, requires_grad=True)
    for name, inputs in (("capsule_routing", layer()), ("dynamic_routing", (u_hat,))):
        ours = count_flops(getattr(capsops, name), *inputs, **options, impl=impl)
        assert ours == count_flops(getattr(reference, name), *inputs, **options), name


@pytest.mark.parametrize(("needs_u", "needs_weight"), [(True, False), (False, True), (False, False)])
def test_gradients_that_are_not_needed_do_not_count(needs_u: bool, needs_weight: bool) -> None:
    inputs = layer(needs_u, needs_weight)
    assert count_flops(capsops.predictions, *inputs) == count_flops(reference.predictions, *inputs)
    assert count_flops(capsops.capsule_routing, *inputs) == count_flops(reference.capsule_routing, *inputs)


@pytest.mark.parametrize(("iterations", "flops"), [(2, 192_000), (3, 230_400), (4, 268_800)])
def test_couplings(iterations: int, flops: int) -> None:
    """û, then for each pass but the last a sum and logits; the reference repeats the routing in each."""
    assert count_flops(capsops.couplings, *layer(), iterations=iterations) == (flops, 0)
    if iterations == 2:
        assert count_flops(reference.couplings, *layer(), iterations=2) == (flops, 0)


def test_calls_without_routing() -> None:
    u_hat = torch.randn(B, I, 1, D)
    assert count_flops(capsops.dynamic_routing, u_hat) == (2 * u_hat.numel(), 0)
    assert count_flops(capsops.couplings, *layer(), iterations=1) == (0, 0)
    assert count_flops(capsops.squash, u_hat) == (0, 0)
