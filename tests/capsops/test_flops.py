"""torch.utils.flop_counter counts as many operations for the ops as for the formula, plain or factored."""

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


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_logits_and_masks_count_nothing(iterations: int, detach: bool) -> None:
    """They are added or chosen, which is no product."""
    options = {"iterations": iterations, "detach": detach}
    want = count_flops(capsops.capsule_routing, *layer(), **options)
    for start in ({"mask": torch.ones(B, I) > 0}, {"logits": torch.zeros(I, J)}):
        assert count_flops(capsops.capsule_routing, *layer(), **start, **options) == want


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_gradients_of_logits_count_like_the_formula(iterations: int, detach: bool) -> None:
    options = {"iterations": iterations, "detach": detach}
    for logits in (torch.zeros(I, J, requires_grad=True), torch.zeros(B, I, J)):
        u_hat = torch.randn(B, I, J, D, requires_grad=True)
        for name, inputs in (("capsule_routing", layer()), ("dynamic_routing", (u_hat,))):
            ours = count_flops(getattr(capsops, name), *inputs, logits=logits, **options)
            assert ours == count_flops(getattr(reference, name), *inputs, logits=logits, **options), name


def count_by_hand(passes: int, of_sums: int, of_weight: int) -> int:
    """Operations of a forward pass with a shared weight: in each pass a sum, in all but the first logits."""
    return (2 * passes - 1) * 2 * (of_sums + of_weight)


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_a_shared_weight_counts_less(iterations: int) -> None:
    """Σ_i c u and u · (Wᵀ V): B · I · J · K products each, and W with B · J vectors."""
    u, weight = torch.randn(B, I, K), torch.randn(J, D, K)
    forward = count_by_hand(iterations, B * I * J * K, B * J * D * K)
    assert count_flops(capsops.capsule_routing, u, weight, iterations=iterations) == (forward, 0)
    assert count_flops(capsops.capsule_routing, u, weight[None], iterations=iterations) == (forward, 0)
    expanded, _ = count_flops(capsops.capsule_routing, u, weight.expand(I, J, D, K), iterations=iterations)
    assert forward < expanded


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_predictions_alike_for_all_outputs_count_as_if_expanded(iterations: int) -> None:
    u_hat, bias = torch.randn(B, I, D, requires_grad=True), torch.randn(J, D)
    expanded = u_hat[:, :, None].expand(B, I, J, D)
    for options in ({"logits": torch.zeros(I, J)}, {}):
        got = count_flops(capsops.dynamic_routing, u_hat, bias, iterations=iterations, **options)
        assert got == count_flops(capsops.dynamic_routing, expanded, bias, iterations=iterations, **options)


def test_gradients_of_a_shared_weight() -> None:
    """Two for each product of the forward pass, without those of the first couplings, which are constant."""
    u, weight = torch.randn(B, I, K, requires_grad=True), torch.randn(J, D, K, requires_grad=True)
    of_sum, of_weight = 2 * B * I * J * K, 2 * B * J * D * K
    assert count_flops(capsops.capsule_routing, u, weight, iterations=1)[1] == of_sum + 2 * of_weight
    assert count_flops(capsops.capsule_routing, u.detach(), weight, iterations=1)[1] == 2 * of_weight
    assert count_flops(capsops.capsule_routing, u, weight, iterations=3)[1] == 9 * of_sum + 10 * of_weight
    logits = torch.zeros(I, J, requires_grad=True)  # and those of the first couplings
    backward = count_flops(capsops.capsule_routing, u, weight, iterations=3, logits=logits)[1]
    assert backward == 10 * of_sum + 10 * of_weight


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
