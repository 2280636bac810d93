"""capsops.ops._eager: calls bypass torch's dispatcher only where it would do nothing but pass them on."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import capsops
from capsops import ops
from capsops.ops import _eager
from tests.capsops.cases import Shape, layer_inputs, value_and_gradients
from tests.processes import run_python

SHAPE = Shape(2, 3, 4, 5, 6)

OPS = ("squash", "predictions", "dynamic_routing", "capsule_routing")


def inputs_of(name: str) -> tuple[Tensor, ...]:
    u, weight, bias = layer_inputs(SHAPE, bias=True)
    fewer = {"squash": (u,), "predictions": (u, weight), "dynamic_routing": (weight,)}
    return fewer.get(name, (u, weight, bias))


class OpRecorder(TorchDispatchMode):
    """Records the names of the ops that reach torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def dispatch_every_call(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sends every call inside through torch's dispatcher."""
    with monkeypatch.context() as context:
        context.setattr(_eager, "_INCLUDED", -1)
        yield


@pytest.mark.parametrize("name", OPS)
def test_results_do_not_depend_on_the_dispatcher(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(name)
    assert ops.is_plain(*inputs)
    direct = value_and_gradients(getattr(capsops, name), inputs)
    with dispatch_every_call(monkeypatch):
        assert not ops.is_plain(*inputs)
        dispatched = value_and_gradients(getattr(capsops, name), inputs)
    assert direct.keys() == dispatched.keys()
    for key, value in direct.items():
        assert (value is None) == (dispatched[key] is None)
        assert value is None or torch.equal(value, dispatched[key])


def test_a_plain_call_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match=r"^u: got shape \[2, 3, 5\], takes \[B, I, K\]"):
        capsops.capsule_routing(torch.zeros(2, 3, 5), torch.zeros(3, 4, 5, 6))


def test_a_plain_call_records_a_gradient_only_if_one_is_required() -> None:
    u, weight, bias = (x.requires_grad_() for x in layer_inputs(SHAPE, bias=True))
    assert capsops.capsule_routing(u, weight, bias).requires_grad
    assert not capsops.capsule_routing(*(x.detach() for x in (u, weight, bias))).requires_grad
    with torch.no_grad():
        assert not capsops.capsule_routing(u, weight, bias).requires_grad
    assert not capsops.couplings(u, weight, bias).requires_grad


@pytest.mark.parametrize("name", OPS)
def test_a_dispatch_mode_sees_the_op_and_its_gradient(name: str) -> None:
    inputs = inputs_of(name)
    with OpRecorder() as recorder:
        value_and_gradients(getattr(capsops, name), inputs)
    assert f"capsops::{name}" in recorder.names
    assert f"capsops::{name}_backward" in recorder.names


def test_a_profiler_sees_the_ops() -> None:
    u, weight = (x.requires_grad_() for x in inputs_of("predictions"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        capsops.capsule_routing(u, weight).sum().backward()
    names = {event.name for event in profile.events()}
    assert {"capsops::capsule_routing", "capsops::capsule_routing_backward"} <= names


@contextlib.contextmanager
def _vmap_level() -> Iterator[None]:
    level = torch._C._functorch._vmap_increment_nesting(2, "error")
    try:
        assert level == 1
        yield
    finally:
        torch._C._functorch._vmap_decrement_nesting()


@pytest.mark.parametrize(
    "context",
    [
        OpRecorder,
        FakeTensorMode,
        lambda: torch.autocast("cpu"),
        lambda: torch.autocast("cuda", dtype=torch.float16),
        torch.inference_mode,
        forward_ad.dual_level,
        _vmap_level,
        torch.profiler.profile,
    ],
    ids=[
        "dispatch mode",
        "fake tensors",
        "autocast",
        "autocast of another device",
        "inference",
        "dual",
        "vmap",
        "profiler",
    ],
)
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda', but CUDA is not available")
@pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla is imported")
def test_calls_inside_these_contexts_are_not_plain(
    context: Callable[[], Any], request: pytest.FixtureRequest
) -> None:
    x = torch.ones(3)
    assert ops.is_plain(x)
    with context():
        plain = ops.is_plain(x)
    without_cuda = request.node.callspec.id == "autocast of another device" and not torch.cuda.is_available()
    assert plain == without_cuda  # torch then keeps that autocast off
    assert ops.is_plain(x)


def test_unusual_tensors_are_not_plain() -> None:
    negated = torch.view_as_complex(torch.randn(3, 2)).conj().imag
    assert negated.is_neg()
    tensors = [
        negated,
        torch.ones(3, device="meta"),
        torch.ones(3).to_sparse(),
        torch._to_functional_tensor(torch.ones(3)),
        FakeTensorMode().from_tensor(torch.ones(3)),
    ]
    with torch.inference_mode():
        tensors.append(torch.ones(3))
    for x in tensors:
        assert not ops.is_plain(x)
        assert not ops.is_plain(torch.ones(3), x)
        assert not ops.is_plain(torch.ones(3), None, x)


def test_a_negated_view_gives_the_result_of_its_copy(impl: str) -> None:
    negated = torch.view_as_complex(torch.randn(3, 4, 2)).conj().imag
    assert negated.is_neg()
    assert torch.equal(capsops.squash(negated, impl=impl), capsops.squash(negated.clone(), impl=impl))


def test_results_are_the_same_in_inference_mode(impl: str) -> None:
    u, weight, bias = (x.detach().float() for x in layer_inputs(SHAPE, bias=True))
    want = capsops.capsule_routing(u, weight, bias, impl=impl)
    with torch.inference_mode():
        value = capsops.capsule_routing(u, weight, bias, impl=impl)
    assert value.is_inference()
    assert torch.equal(value, want)


@pytest.mark.parametrize("context", ["torch.inference_mode()", "torch.autocast('cpu')", "FakeTensorMode()"])
def test_is_plain_does_not_depend_on_where_capsops_is_imported(context: str) -> None:
    code = (
        "import torch\n"
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "x = torch.ones(3)\n"
        f"with {context}:\n"
        "    from capsops import ops\n"
        "    print(ops.is_plain(x))\n"
        "print(ops.is_plain(x))"
    )
    done = run_python("-c", code, fresh=True)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_every_op_takes_its_tensors_first() -> None:
    for name in ("squash", "predictions", "dynamic_routing", "capsule_routing", "couplings"):
        kinds = [str(x.type) for x in getattr(torch.ops.capsops, name).default._schema.arguments]
        assert sorted(kinds, key=lambda kind: "Tensor" not in kind) == kinds


class Watched(torch.nn.Parameter):
    """A parameter whose class sees the functions that are called with it."""

    seen: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(function)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def test_a_subclass_sees_the_op_and_its_gradient_but_nothing_inside_them() -> None:
    Watched.seen.clear()
    weight = Watched(torch.randn(3, 5, 6, 4))
    capsops.capsule_routing(torch.randn(2, 3, 4), weight).sum().backward()
    assert Watched.seen == [capsops.capsule_routing, torch.ops.capsops.capsule_routing_backward.default]
