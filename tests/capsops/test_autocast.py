"""The ops under autocast, which treats them like matrix products."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import capsops
from tests.capsops.cases import Shape, layer_inputs, routing_inputs
from tests.capsops.compare import assert_close

SHAPE = Shape(5, 7, 4, 16, 8)
DTYPES = [torch.bfloat16, torch.float16]
MASK = torch.arange(SHAPE.I) < torch.arange(2, SHAPE.B + 2)[:, None]

CALLS: dict[str, Callable[..., Tensor]] = {
    "squash": lambda u, weight, bias, u_hat, **impl: capsops.squash(u, **impl),
    "predictions": lambda u, weight, bias, u_hat, **impl: capsops.predictions(u, weight, **impl),
    "dynamic_routing": lambda u, weight, bias, u_hat, **impl: capsops.dynamic_routing(u_hat, bias, **impl),
    "capsule_routing": lambda u, weight, bias, u_hat, **impl: capsops.capsule_routing(
        u, weight, bias, **impl
    ),
    "couplings": lambda u, weight, bias, u_hat, **impl: capsops.couplings(u, weight, bias, **impl),
    "capsule_routing of a shared weight, with logits and a mask": (
        lambda u, weight, bias, u_hat, **impl: capsops.capsule_routing(
            u, weight[0], logits=bias[:, 0], mask=MASK, **impl
        )
    ),
    "dynamic_routing with logits and a mask": (
        lambda u, weight, bias, u_hat, **impl: capsops.dynamic_routing(
            u_hat, logits=bias[:, 0], mask=MASK, squash_output=False, **impl
        )
    ),
}


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [*layer_inputs(SHAPE, bias=True, dtype=dtype), routing_inputs(SHAPE, dtype=dtype)[0]]


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", CALLS)
def test_float32_is_computed_in_the_dtype_of_autocast(impl: str, op: str, dtype: torch.dtype) -> None:
    inputs = tensors()
    with autocast(dtype):
        got = CALLS[op](*inputs, impl=impl)
    assert got.dtype == dtype
    assert torch.equal(got, CALLS[op](*(x.to(dtype) for x in inputs), impl=impl))


@pytest.mark.parametrize("op", CALLS)
def test_float64_is_not_converted(impl: str, op: str) -> None:
    inputs = tensors(torch.float64)
    want = CALLS[op](*inputs, impl=impl)
    with autocast(torch.bfloat16):
        got = CALLS[op](*inputs, impl=impl)
    assert got.dtype == torch.float64
    assert_close(got, want, tolerance=1e-14)


@pytest.mark.parametrize("op", [op for op in CALLS if op != "squash"])
def test_mixed_dtypes_are_accepted_only_under_autocast(impl: str, op: str) -> None:
    u, weight, bias, u_hat = tensors()
    mixed = (u.bfloat16(), weight, bias, u_hat.bfloat16())
    with pytest.raises(
        TypeError, match=r"got dtype torch\.float32, takes that of .*, which is torch\.bfloat16"
    ):
        CALLS[op](*mixed, impl=impl)
    with autocast(torch.bfloat16):
        got = CALLS[op](*mixed, impl=impl)
    assert torch.equal(got, CALLS[op](*(x.bfloat16() for x in mixed), impl=impl))
    with (
        autocast(torch.bfloat16),
        torch.autocast("cpu", enabled=False),
        pytest.raises(TypeError, match="dtype"),
    ):
        CALLS[op](*mixed, impl=impl)


def test_float64_is_not_accepted_together_with_float32(impl: str) -> None:
    u, weight, _, _ = tensors()
    with autocast(torch.bfloat16), pytest.raises(TypeError, match="weight: got dtype"):
        capsops.predictions(u, weight.double(), impl=impl)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_dtype_of_the_parameters(impl: str, dtype: torch.dtype) -> None:
    u, weight, bias, _ = (x.requires_grad_() for x in tensors())
    with autocast(dtype):
        v = capsops.capsule_routing(u, weight, bias, impl=impl)
    loss = v.float().square().sum()
    got = torch.autograd.grad(loss, (u, weight, bias))
    low = [x.detach().to(dtype).requires_grad_() for x in (u, weight, bias)]
    want = torch.autograd.grad(capsops.capsule_routing(*low, impl=impl).float().square().sum(), low)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32
        assert torch.equal(g, w.float())


@pytest.mark.parametrize("op", [op for op in CALLS if op != "couplings"])
@pytest.mark.parametrize("forward", ["inside", "outside"])
def test_autocast_does_not_change_the_backward_pass(impl: str, forward: str, op: str) -> None:
    """It applies to the forward pass; backward computes the same inside as outside."""
    inputs = [x.requires_grad_() for x in tensors()]

    def gradients(inside: bool) -> tuple[Tensor | None, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=forward == "inside"):
            value = CALLS[op](*inputs, impl=impl)
        upstream = torch.linspace(-1, 1, value.numel()).view_as(value).to(value.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return torch.autograd.grad(value, inputs, upstream, allow_unused=True)

    for g, w in zip(gradients(inside=True), gradients(inside=False), strict=True):
        assert (g is None) == (w is None)
        assert g is None or torch.equal(g, w)


@pytest.mark.parametrize("op", ["squash", "dynamic_routing", "capsule_routing"])
def test_gradient_penalty_inside_autocast(impl: str, op: str) -> None:
    """Critics often compute their penalty inside autocast: its gradients exist and are finite."""
    inputs = [x.requires_grad_() for x in tensors()]
    leaf = inputs[3] if op == "dynamic_routing" else inputs[0]
    with autocast(torch.bfloat16):
        value = CALLS[op](*inputs, impl=impl).float().sum()
        (first,) = torch.autograd.grad(value, leaf, create_graph=True)
        penalty = (first.float().norm() - 1) ** 2
    (got,) = torch.autograd.grad(penalty, leaf, retain_graph=True)
    with autocast(torch.bfloat16):
        (inside,) = torch.autograd.grad(penalty, leaf)
    assert torch.equal(inside, got)
    assert got.dtype == torch.float32
    assert got.isfinite().all()
    assert got.abs().sum() > 0


def test_network_in_mixed_precision(impl: str) -> None:
    """A convolution, primary capsules and routing capsules under autocast, with float32 parameters."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 5),
        capsops.nn.PrimaryCapsules(8, 2, 8, 5),
        capsops.nn.RoutingCapsules(32, 3, 8, 16),
    )
    with capsops.use_impl(impl), autocast(torch.bfloat16):
        v = network(torch.randn(4, 1, 16, 16))
        assert v.dtype == torch.bfloat16
        v.float().norm(dim=-1).sum().backward()
    for parameter in network.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
