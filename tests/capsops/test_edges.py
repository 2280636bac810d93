"""Edge cases: couplings that underflow, first passes, strides of saved sums, types of options."""

import pytest
import torch

import capsops
from capsops import reference


@pytest.mark.parametrize(("dtype", "huge"), [(torch.float32, 1e35), (torch.float64, 1e304)])
def test_a_coupling_that_underflows_is_zero(impl: str, dtype: torch.dtype, huge: float) -> None:
    """The exponential of a logit far below the largest is 0, even as a factor of a huge û."""
    u_hat = torch.zeros(5, 1152, 2, 1, dtype=dtype)
    u_hat[:, :, 0], u_hat[:, :, 1] = huge, 0.3 * huge
    v = capsops.dynamic_routing(u_hat, iterations=2, impl=impl)
    assert torch.equal(v, reference.dynamic_routing(u_hat, iterations=2))
    u, weight = torch.ones(5, 1152, 1, dtype=dtype), u_hat[0].unsqueeze(-1).contiguous()
    assert torch.equal(capsops.capsule_routing(u, weight, iterations=2, impl=impl), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 4, 17])
def test_an_input_capsule_that_opposes_all_others_goes_to_the_orphan(
    impl: str, batch: int, dtype: torch.dtype
) -> None:
    """Seven predict (1000, 0), one (−1000, 1000): its logits are about −800, the orphan's is 0."""
    u, weight = torch.ones(batch, 8, 1, dtype=dtype), torch.zeros(8, 2, 2, 1, dtype=dtype)
    weight[:7, :, 0], weight[7, :, 0], weight[7, :, 1] = 1000, -1000, 1000
    c = capsops.couplings(u, weight, iterations=2, leaky=True, impl=impl)
    assert torch.equal(c[:, :7], torch.full((batch, 7, 2), 0.5, dtype=dtype))
    assert torch.equal(c[:, 7], torch.zeros(batch, 2, dtype=dtype))
    want = torch.tensor([1.0, 0.0], dtype=dtype).expand(batch, 2, 2)
    for v in (
        capsops.capsule_routing(u, weight, iterations=2, leaky=True, impl=impl),
        capsops.dynamic_routing(reference.predictions(u, weight), iterations=2, leaky=True, impl=impl),
    ):
        torch.testing.assert_close(v, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_largest_nan_of_float32_is_nan_in_16_bits(impl: str, dtype: torch.dtype) -> None:
    """It would become −0 if its bits were rounded up."""
    s = torch.full((3, 2, 4, 5), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    grad, u_hat = torch.ones(2, 4, 5, dtype=dtype), torch.ones(2, 3, 4, 5, dtype=dtype)
    gradients = torch.ops.capsops.dynamic_routing_backward(
        grad, u_hat, None, None, None, s, 3, False, False, True, False, impl
    )[:2]
    assert all(x.isnan().all() for x in gradients)


def test_couplings_of_the_first_pass_do_not_depend_on_u(impl: str) -> None:
    u, weight = torch.full((3, 4, 2), float("nan")), torch.ones(4, 5, 3, 2)
    assert torch.equal(capsops.couplings(u, weight, iterations=1, impl=impl), torch.full((3, 4, 5), 0.2))
    leaky = capsops.couplings(u, weight, iterations=1, leaky=True, impl=impl)
    assert torch.equal(leaky, torch.full((3, 4, 5), 1 / 6))


def test_saved_sums_in_any_layout(impl: str) -> None:
    u, weight, grad = torch.randn(3, 4, 2), torch.randn(4, 5, 3, 2), torch.randn(3, 5, 3)
    _, s = torch.ops.capsops.capsule_routing(u, weight, None, None, None, 3, False, False, True, impl)
    strided = s.transpose(0, 3).contiguous().transpose(0, 3)
    backward = torch.ops.capsops.capsule_routing_backward
    options = (3, False, False, True, True, True, False, impl)
    for got, want in zip(
        backward(grad, u, weight, None, None, None, strided, *options),
        backward(grad, u, weight, None, None, None, s, *options),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_only_the_bias_requires_a_gradient(impl: str) -> None:
    u, weight = torch.randn(5, 4, 2), torch.randn(4, 5, 3, 2)
    bias = torch.randn(5, 3, requires_grad=True)
    (got,) = torch.autograd.grad(capsops.capsule_routing(u, weight, bias, impl=impl).sum(), bias)
    (want,) = torch.autograd.grad(reference.capsule_routing(u, weight, bias).sum(), bias)
    torch.testing.assert_close(got, want)


def test_options_of_other_types_are_rejected() -> None:
    u_hat = torch.randn(2, 3, 4, 5)
    with pytest.raises(TypeError, match="dim: got float, takes an int"):
        capsops.squash(u_hat, 0.5)
    with pytest.raises(TypeError, match="leaky: got str, takes a bool"):
        capsops.dynamic_routing(u_hat, leaky="no")
    with pytest.raises(TypeError, match="detach: got int, takes a bool"):
        capsops.dynamic_routing(u_hat, detach=1)


def test_penalties_in_16_bit_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    u, weight = torch.randn(4, 50, 8), 0.05 * torch.randn(50, 10, 16, 8)
    formula, dtypes = reference.capsule_routing, []

    def recording(*tensors: torch.Tensor | None, **options: object) -> torch.Tensor:
        dtypes.extend(x.dtype for x in tensors if x is not None)
        return formula(*tensors, **options)

    monkeypatch.setattr(reference, "capsule_routing", recording)

    def penalty(dtype: torch.dtype) -> torch.Tensor:
        x = u.bfloat16().to(dtype).requires_grad_()
        v = capsops.capsule_routing(x, weight.bfloat16().to(dtype))
        (first,) = torch.autograd.grad(v.sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0].double()

    exact, got = penalty(torch.float64), penalty(torch.bfloat16)
    assert (got - exact).norm() < 0.05 * exact.norm()
    assert dtypes == [torch.float64] * 2 + [torch.float32] * 2
