"""torch.compile(fullgraph=True): no graph breaks, eager mode's results, one graph for all batch sizes."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import capsops
from capsops.backends.backend import LOGITS, MASK
from tests.capsops.cases import Options, Shape, layer_inputs, routing_inputs, value_and_gradients
from tests.capsops.compare import assert_all_close, assert_close
from tests.capsops.routing_options import Routing, ours, skip_unless_supported, tensors

SHAPE = Shape(5, 7, 4, 16, 8)


@pytest.fixture(autouse=True)
def reset_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_and_count(
    function: Callable[..., Tensor], **options: object
) -> tuple[Callable[..., Tensor], CompileCounterWithBackend]:
    """The compiled function, and the backend of torch.compile that counts its graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


@pytest.mark.parametrize(
    "options", [Options(0, bias=True), Options(3, bias=True), Options(2, True, True)], ids=str
)
def test_layer_agrees_with_eager_mode(impl: str, options: Options) -> None:
    function = partial(capsops.capsule_routing, impl=impl, **options.keywords())
    inputs = layer_inputs(SHAPE, options.bias)
    compiled = torch.compile(lambda *x: function(*x), fullgraph=True, backend="aot_eager")
    assert_all_close(value_and_gradients(compiled, inputs), value_and_gradients(function, inputs), 1e-14)


@pytest.mark.parametrize(
    "routing",
    [
        Routing(Options(3, bias=True), "IJ"),
        Routing(Options(2, leaky=True), "BIJ", closed=True, mask=True),
        Routing(Options(3, bias=True), "", shared=True),
        Routing(Options(2, bias=True), "J", True, True, True, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", ["dynamic_routing", "capsule_routing"])
def test_routing_options_agree_with_eager_mode(impl: str, op: str, routing: Routing) -> None:
    """Forward and backward, with the gradient of the logits."""
    skip_unless_supported(impl, routing.used(), torch.float64)
    inputs, function = tensors(op, SHAPE, routing), ours(op, impl, routing)
    compiled, counter = compile_and_count(function)
    got, want = value_and_gradients(compiled, inputs), value_and_gradients(function, inputs)
    assert counter.frame_count == 1
    for name, tensor in want.items():
        assert_close(got[name], tensor, name, tolerance=1e-14, floor=1)


@pytest.mark.parametrize("dynamic", [None, True])
def test_batch_size_changes_with_logits_and_a_mask(impl: str, dynamic: bool | None) -> None:
    skip_unless_supported(impl, frozenset((LOGITS, MASK)), torch.float64)
    routing = Routing(Options(2), "IJ", mask=True)
    function = ours("capsule_routing", impl, routing)
    compiled, counter = compile_and_count(function, dynamic=dynamic)
    _, weight, _, logits, _ = tensors("capsule_routing", SHAPE, routing)
    for batch in (5, 16, 33):
        u, *_, mask = tensors("capsule_routing", SHAPE._replace(B=batch), routing)
        inputs = [u, weight, None, logits, mask]
        got, want = value_and_gradients(compiled, inputs), value_and_gradients(function, inputs)
        for name, tensor in want.items():
            assert_close(got[name], tensor, name, tolerance=1e-14, floor=1)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("op", ["squash", "predictions", "dynamic_routing", "couplings"])
def test_other_ops_agree_with_eager_mode(impl: str, op: str) -> None:
    u, weight, bias = layer_inputs(SHAPE, bias=True)
    inputs = {
        "squash": [u],
        "predictions": [u, weight],
        "dynamic_routing": list(routing_inputs(SHAPE, bias=True)),
        "couplings": [u, weight, bias],
    }[op]
    needs = [op != "couplings"] * len(inputs)
    function = partial(getattr(capsops, op), impl=impl)
    compiled = torch.compile(lambda *x: function(*x), fullgraph=True, backend="aot_eager")
    assert_all_close(
        value_and_gradients(compiled, inputs, needs=needs),
        value_and_gradients(function, inputs, needs=needs),
        1e-14,
    )


@pytest.mark.parametrize("mark", [True, False])
def test_batch_size_changes_without_a_new_graph(impl: str, mark: bool) -> None:
    """One graph if the batch axis is marked as dynamic, two if torch.compile discovers that it is."""
    compiled, counter = compile_and_count(lambda *x: capsops.capsule_routing(*x, impl=impl))
    for batch in (5, 16, 33, 2):
        u, weight, bias = layer_inputs(SHAPE._replace(B=batch), bias=True)
        if mark:
            torch._dynamo.mark_dynamic(u, 0)
        leaf = weight.requires_grad_()
        v = compiled(u, leaf, bias)
        assert_close(v, capsops.capsule_routing(u, weight, bias, impl=impl), tolerance=1e-14)
        v.sum().backward()
        assert leaf.grad.isfinite().all()
    assert counter.frame_count == (1 if mark else 2)


def test_options_are_constants_of_the_graph(impl: str) -> None:
    compiled, _ = compile_and_count(
        lambda x, iterations, leaky: capsops.dynamic_routing(x, iterations=iterations, leaky=leaky, impl=impl)
    )
    u_hat, _ = routing_inputs(SHAPE)
    for iterations in range(4):
        for leaky in (False, True):
            want = capsops.dynamic_routing(u_hat, iterations=iterations, leaky=leaky, impl=impl)
            assert_close(compiled(u_hat, iterations, leaky), want, tolerance=1e-14)


def test_use_impl_around_a_compiled_function(impl: str, change_backend: Callable[..., None]) -> None:
    """Another backend needs another graph; a return to the first one does not."""
    calls = []
    for name in {"reference", impl}:
        squash = capsops.dispatch.BACKENDS[name].functions["squash"]
        change_backend(name, squash=lambda s, dim, n=name, f=squash: calls.append(n) or f(s, dim))
    compiled, counter = compile_and_count(lambda s: capsops.squash(s) * 2)
    s = torch.randn(3, 4)
    with capsops.use_impl(impl):
        compiled(s)
    with capsops.use_impl("reference"):
        compiled(s)
    with capsops.use_impl(impl):
        compiled(s)
    assert calls == [impl, "reference", impl]
    assert counter.frame_count == (1 if impl == "reference" else 2)


def test_use_impl_inside_a_compiled_function(impl: str) -> None:
    def function(s: Tensor) -> Tensor:
        with capsops.use_impl(impl):
            return capsops.squash(s) * 2

    before = capsops.dispatch.asked("auto")
    compiled, _ = compile_and_count(function)
    s = torch.randn(3, 4)
    assert_close(compiled(s), capsops.squash(s, impl=impl) * 2, tolerance=1e-6)
    assert capsops.dispatch.asked("auto") == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(impl: str, dtype: torch.dtype) -> None:
    def function(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return capsops.capsule_routing(u @ u.mT @ u, weight, bias, impl=impl)

    inputs = layer_inputs(SHAPE, bias=True, dtype=torch.float32)
    compiled, _ = compile_and_count(function)
    got, want = value_and_gradients(compiled, inputs), value_and_gradients(function, inputs)
    assert got["value"].dtype == dtype
    assert_all_close(got, want, tolerance=4 * torch.finfo(dtype).eps)


def test_errors_are_raised_from_compiled_code_too(impl: str) -> None:
    compiled, _ = compile_and_count(lambda u, weight: capsops.predictions(u, weight, impl=impl))
    with pytest.raises(Exception, match="u: got shape"):
        compiled(torch.zeros(2, 3, 4), torch.zeros(3, 5, 6, 7))


def test_strided_inputs(impl: str) -> None:
    """A compiled graph passes views and gradients of any strides."""

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return capsops.capsule_routing(x.transpose(1, 2), weight, impl=impl).transpose(0, 2)

    x, weight = torch.randn(5, 8, 7).double(), layer_inputs(SHAPE)[1]
    compiled, _ = compile_and_count(function)
    assert_all_close(
        value_and_gradients(compiled, [x, weight]),
        value_and_gradients(function, [x, weight]),
        tolerance=1e-14,
    )


class StoredPredictions(torch.nn.Module):
    """A layer that stores its predictions and then routes them."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(sizes))

    def forward(self, u: Tensor) -> Tensor:
        return capsops.dynamic_routing(capsops.predictions(u, self.weight))


def test_whole_network_with_inductor(impl: str) -> None:
    """A convolution, primary capsules, three layers of routing and a loss, forward and backward.

    One graph is used for all batch sizes, so that none of them can be compiled in as a constant.
    """
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 5),
        torch.nn.ReLU(),
        capsops.nn.PrimaryCapsules(8, 2, 4, 5),
        capsops.nn.RoutingCapsules(32, 5, 4, 6),
        capsops.nn.RoutingCapsules(5, 3, 6, 8, leaky=True, detach=True),
        StoredPredictions(3, 2, 5, 8),
    ).double()

    def step(images: Tensor, forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        loss = forward(images).norm(dim=-1).square().sum()
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        return {"loss": loss.detach(), **{str(n): g for n, g in enumerate(gradients)}}

    with capsops.use_impl(impl):
        counter = CompileCounterWithBackend("inductor")
        compiled = torch.compile(network, fullgraph=True, backend=counter)
        for batch in (8, 5, 6):
            images = torch.randn(batch, 1, 16, 16, dtype=torch.float64)
            torch._dynamo.mark_dynamic(images, 0)
            assert_all_close(step(images, compiled), step(images, network), tolerance=1e-12)
    assert counter.frame_count == 1
