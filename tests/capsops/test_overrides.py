"""Calls that __torch_function__ intercepts: proxies of torch.fx, modes, subclasses and other classes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import capsops

U, WEIGHT, BIAS = torch.randn(2, 6, 4), torch.randn(6, 3, 5, 4), torch.randn(3, 5)
MASK = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
CALLS: dict[str, Callable[..., Tensor]] = {
    "squash": lambda u, w, b: capsops.squash(u, 1),
    "predictions": lambda u, w, b: capsops.predictions(u, w, impl="reference"),
    "dynamic_routing": lambda u, w, b: capsops.dynamic_routing(
        w.transpose(2, 3), iterations=2, leaky=True, detach=True
    ),
    "capsule_routing": lambda u, w, b: capsops.capsule_routing(u, w, b, iterations=2),
    "couplings": lambda u, w, b: capsops.couplings(u, w, b, leaky=True),
    "dynamic_routing with options": lambda u, w, b: capsops.dynamic_routing(
        w.transpose(2, 3), logits=b, mask=MASK.view(6, 2)[:, :1].expand(6, 3), squash_output=False
    ),
    "capsule_routing with options": lambda u, w, b: capsops.capsule_routing(
        u, w, logits=b, mask=MASK, squash_output=False
    ),
    "couplings with options": lambda u, w, b: capsops.couplings(u, w, logits=b, mask=MASK),
}

# Where a call has options, `b` is its starting logits and `w` a weight shared by all input capsules.
ARGUMENTS = {
    **dict.fromkeys(CALLS, (U, WEIGHT, BIAS)),
    "dynamic_routing with options": (U, WEIGHT, torch.randn(4)),
    "capsule_routing with options": (U, WEIGHT[0], torch.randn(3)),
    "couplings with options": (U, WEIGHT[0], torch.randn(3)),
}


def function_of(name: str) -> Callable[..., Tensor]:
    return getattr(capsops, name.split()[0])


@pytest.mark.parametrize("name", CALLS)
def test_fx_records_each_function(name: str) -> None:
    traced = torch.fx.symbolic_trace(CALLS[name])
    assert function_of(name) in [node.target for node in traced.graph.nodes]
    assert torch.equal(traced(*ARGUMENTS[name]), CALLS[name](*ARGUMENTS[name]))


def test_fx_traces_the_layers() -> None:
    network = nn.Sequential(
        capsops.nn.PrimaryCapsules(1, 2, 4, 3, padding=1),
        capsops.nn.RoutingCapsules(32, 3, 4, 5),
        nn.Flatten(),
    )
    traced = torch.fx.symbolic_trace(network)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert targets == [capsops.squash, capsops.capsule_routing]
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(traced(x), network(x))
    traced(x).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("layer", "u"),
    [
        (capsops.nn.RoutingCapsules(1, 3, 4, 5), torch.randn(2, 1, 4)),
        (capsops.nn.RoutingCapsules(1, 3, 4, 5, shared=True), torch.randn(2, 7, 4)),
        (capsops.nn.ConvRoutingCapsules(3, 2, 4, 5, kernel_size=3), torch.randn(2, 3, 4, 6, 6)),
    ],
    ids=["one input capsule", "shared weight", "convolution"],
)
def test_fx_traces_a_layer(layer: nn.Module, u: Tensor) -> None:
    assert torch.equal(torch.fx.symbolic_trace(layer)(u), layer(u))


def test_fx_prepares_a_network_for_quantisation() -> None:
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    mapping = torch.ao.quantization.get_default_qconfig_mapping()
    network = nn.Sequential(nn.Linear(4, 4), capsops.nn.RoutingCapsules(6, 3, 4, 5)).eval()
    prepared = quantize_fx.prepare_fx(network, mapping, (U,))
    assert torch.allclose(prepared(U), network(U))
    assert capsops.capsule_routing in [node.target for node in prepared.graph.nodes]


@pytest.mark.parametrize("name", CALLS)
def test_a_mode_receives_the_call(name: str) -> None:
    calls = []

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
        ) -> Tensor:
            calls.append(function)
            return function(*args, **(kwargs or {}))

    with Mode():
        result = CALLS[name](*ARGUMENTS[name])
    assert function_of(name) in calls
    assert torch.equal(result, CALLS[name](*ARGUMENTS[name]))


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("name", CALLS)
def test_results_keep_the_subclass(name: str) -> None:
    subclassed = CALLS[name](*(x.as_subclass(Plain) for x in ARGUMENTS[name]))
    assert type(subclassed) is Plain
    assert torch.equal(subclassed.as_subclass(Tensor), CALLS[name](*ARGUMENTS[name]))


@pytest.mark.parametrize("name", CALLS)
def test_another_class_can_override_a_function(name: str) -> None:
    class Override:
        @classmethod
        def __torch_function__(
            cls, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
        ) -> str:
            return function.__name__

        def transpose(self, *axes: int) -> "Override":
            return self

    assert CALLS[name](Override(), Override(), Override()) == function_of(name).__name__
