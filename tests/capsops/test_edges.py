"""Edges that reviews found: couplings that vanish, first passes, strides of saved sums, types of options."""

import pytest
import torch

import capsops
from capsops import reference


def test_a_coupling_that_vanishes_is_zero(impl: str) -> None:
    """A logit 100 below the largest: e⁻¹⁰⁰ is 0 in float32, also when a huge û is multiplied by it."""
    u_hat = torch.zeros(5, 1152, 2, 1)
    u_hat[:, :, 0], u_hat[:, :, 1] = 1e35, 3e34
    v = capsops.dynamic_routing(u_hat, iterations=2, impl=impl)
    assert torch.equal(v, reference.dynamic_routing(u_hat, iterations=2))
    u, weight = torch.ones(5, 1152, 1), u_hat[0].unsqueeze(-1).contiguous()
    assert torch.equal(capsops.capsule_routing(u, weight, iterations=2, impl=impl), v)


def test_couplings_of_the_first_pass_do_not_depend_on_u(impl: str) -> None:
    u, weight = torch.full((3, 4, 2), float("nan")), torch.ones(4, 5, 3, 2)
    assert torch.equal(capsops.couplings(u, weight, iterations=1, impl=impl), torch.full((3, 4, 5), 0.2))
    leaky = capsops.couplings(u, weight, iterations=1, leaky=True, impl=impl)
    assert torch.equal(leaky, torch.full((3, 4, 5), 1 / 6))


def test_saved_sums_in_any_layout(impl: str) -> None:
    u, weight, grad = torch.randn(3, 4, 2), torch.randn(4, 5, 3, 2), torch.randn(3, 5, 3)
    _, s = torch.ops.capsops.capsule_routing(u, weight, None, None, None, 3, False, False, True, impl)
    turned = s.transpose(0, 3).contiguous().transpose(0, 3)
    backward = torch.ops.capsops.capsule_routing_backward
    options = (3, False, False, True, True, True, impl)
    for got, want in zip(
        backward(grad, u, weight, None, turned, *options),
        backward(grad, u, weight, None, s, *options),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_only_the_bias_is_trained(impl: str) -> None:
    u, weight = torch.randn(5, 4, 2), torch.randn(4, 5, 3, 2)
    bias = torch.randn(5, 3, requires_grad=True)
    (got,) = torch.autograd.grad(capsops.capsule_routing(u, weight, bias, impl=impl).sum(), bias)
    (want,) = torch.autograd.grad(reference.capsule_routing(u, weight, bias).sum(), bias)
    torch.testing.assert_close(got, want)


def test_types_of_options() -> None:
    u_hat = torch.randn(2, 3, 4, 5)
    with pytest.raises(TypeError, match="dim: got float, takes an int"):
        capsops.squash(u_hat, 0.5)
    with pytest.raises(TypeError, match="leaky: got str, takes a bool"):
        capsops.dynamic_routing(u_hat, leaky="no")
    with pytest.raises(TypeError, match="detach: got int, takes a bool"):
        capsops.dynamic_routing(u_hat, detach=1)


def test_penalties_in_16_bit_are_summed_in_float32() -> None:
    u, weight = torch.randn(4, 50, 8), 0.05 * torch.randn(50, 10, 16, 8)

    def penalty(dtype: torch.dtype) -> torch.Tensor:
        x = u.bfloat16().to(dtype).requires_grad_()
        v = capsops.capsule_routing(x, weight.bfloat16().to(dtype))
        (first,) = torch.autograd.grad(v.sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0].double()

    exact, got = penalty(torch.float64), penalty(torch.bfloat16)
    assert (got - exact).norm() < 0.05 * exact.norm()
