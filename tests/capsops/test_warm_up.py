"""capsops.warm_up: one call, forward and backward, that leaves no trace."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import capsops
from capsops import graph_capture
from capsops.backends import BACKENDS

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def calls(change_backend: Callable[..., None]) -> list[str]:
    """The functions of the reference that were called, in order."""
    called: list[str] = []

    def recorded(name: str, function: Callable) -> Callable:
        def call(*args: object) -> object:
            called.append(name)
            return function(*args)

        return call

    functions = BACKENDS["reference"].functions
    change_backend("reference", functions={name: recorded(name, f) for name, f in functions.items()})
    return called


BOTH = ["capsule_routing", "capsule_routing_backward"]


def test_a_layer_runs_forward_and_backward_and_keeps_its_gradients(calls: list[str]) -> None:
    layer = capsops.nn.RoutingCapsules(6, 3, 4, 5)
    u = torch.randn(2, 6, 4)
    layer.bias.grad = torch.ones_like(layer.bias)
    before = {name: x.clone() for name, x in layer.state_dict().items()}
    with capsops.use_impl("reference"):
        capsops.warm_up(layer, u)
    assert calls == BOTH
    assert layer.weight.grad is None
    assert torch.equal(layer.bias.grad, torch.ones_like(layer.bias))
    assert all(torch.equal(x, before[name]) for name, x in layer.state_dict().items())


def test_a_function_runs_backward_for_an_input_that_requires_a_gradient(calls: list[str]) -> None:
    u, weight = torch.randn(2, 6, 4), torch.randn(6, 3, 5, 4)
    capsops.warm_up(capsops.capsule_routing, u, weight, iterations=2, impl="reference")
    assert calls == BOTH[:1]
    u.requires_grad_()
    capsops.warm_up(capsops.capsule_routing, u, weight=weight, impl="reference")
    assert calls[1:] == BOTH
    assert u.grad is None
    with torch.no_grad():
        capsops.warm_up(capsops.capsule_routing, u, weight, impl="reference")
    assert calls[3:] == BOTH[:1]


def test_inputs_in_containers_and_results_in_containers(calls: list[str]) -> None:
    def losses(batch: dict[str, list[Tensor]], scale: float) -> dict[str, Tensor | float]:
        v = capsops.capsule_routing(*batch["tensors"], impl="reference")
        return {"loss": scale * v.square().sum(), "scale": scale, "detached": v.detach()}

    tensors = [torch.randn(2, 6, 4, requires_grad=True), torch.randn(6, 3, 5, 4)]
    capsops.warm_up(losses, {"tensors": tensors}, 2.0)
    assert calls == BOTH
    assert tensors[0].grad is None


def test_an_input_that_is_not_used_or_not_a_leaf() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    capsops.warm_up(lambda used, unused: capsops.squash(used), 2 * x, x)
    assert x.grad is None


def test_random_numbers_are_those_that_would_have_come() -> None:
    layer = torch.nn.Sequential(torch.nn.Dropout(), capsops.nn.RoutingCapsules(6, 3, 4, 5))
    torch.manual_seed(0)
    want = torch.rand(5)
    torch.manual_seed(0)
    capsops.warm_up(layer, torch.ones(2, 6, 4))
    assert torch.equal(torch.rand(5), want)


def test_errors_of_the_function_are_its_own() -> None:
    with pytest.raises(ValueError, match="u"):
        capsops.warm_up(capsops.capsule_routing, torch.randn(2, 6), torch.randn(6, 3, 5, 4))


def test_a_call_during_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert graph_capture.capturing()
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured; call it before the capture"):
        capsops.warm_up(capsops.squash, torch.ones(3))


def test_cuda_tensors_are_used_on_streams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the calls, with streams that only record what is done to them."""
    events: list[str] = []

    class Stream:
        def __init__(self, device: torch.device, name: str = "aside") -> None:
            self.name = f"{name} {device.index}"

        def wait_stream(self, other: "Stream") -> None:
            events.append(f"{self.name} waits for {other.name}")

        def __enter__(self) -> None:
            events.append(f"enter {self.name}")

        def __exit__(self, *error: object) -> None:
            events.append(f"leave {self.name}")

    module = sys.modules[capsops.warm_up.__module__]
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device, "current"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    with module._side_streams([torch.device("cuda", 0), torch.device("cuda", 1)]):
        events.append("call")
    assert events == [
        "aside 0 waits for current 0",
        "enter aside 0",
        "aside 1 waits for current 1",
        "enter aside 1",
        "call",
        "leave aside 1",
        "current 1 waits for aside 1",
        "leave aside 0",
        "current 0 waits for aside 0",
    ]
