"""The public functions with impl="cuda" on a CUDA device; all tests are skipped without one.

tests/cuda_emulator tests the kernels' logic on every machine; this file tests what only a device can show.
"""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

import capsops
from capsops import dispatch, reference
from tests.capsops.cases import (
    FEW_OPTIONS,
    GRID,
    LOW_PRECISION,
    SHAPES,
    Options,
    Shape,
    layer_inputs,
    routing_inputs,
    runs_in_other_orders,
    value_and_gradients,
)
from tests.capsops.compare import assert_all_close, assert_all_low_precision

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

MNIST = Shape(128, 1152, 10, 16, 8)
LARGE = Shape(16, 3872, 196, 16, 8)


@pytest.fixture(autouse=True)
def tf32_not_allowed() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_device(inputs: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if x is None else x.cuda() for x in inputs]


def check(op: str, inputs: tuple[Tensor | None, ...], axes: tuple[int | None, ...], options: Options) -> None:
    """Asserts the precision of plain torch on the host in 16 bits, and of 32 roundings in float32."""
    plain = partial(getattr(reference, op), **options.keywords())
    ours = partial(getattr(capsops, op), **options.keywords(), impl="cuda")
    exact = value_and_gradients(plain, [None if x is None else x.double() for x in inputs])
    got = {name: x.cpu() for name, x in value_and_gradients(ours, on_device(inputs)).items()}
    if inputs[0].dtype == torch.float32:
        tolerance = 32 * torch.finfo(torch.float32).eps
        assert_all_close({name: x.double() for name, x in got.items()}, exact, tolerance)
    else:
        assert_all_low_precision(got, runs_in_other_orders(plain, inputs, axes, None), exact)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize(("shape", "options"), GRID, ids=str)
def test_capsule_routing(shape: Shape, options: Options, dtype: torch.dtype) -> None:
    check("capsule_routing", layer_inputs(shape, options.bias, dtype), (1, 0, None), options)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("options", FEW_OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, Shape(140, 300, 10, 16, 1), Shape(100, 37, 3, 8, 1)], ids=str)
def test_dynamic_routing(shape: Shape, options: Options, dtype: torch.dtype) -> None:
    check("dynamic_routing", routing_inputs(shape, options.bias, dtype), (1, None), options)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("shape", [MNIST, LARGE], ids=str)
def test_capsule_routing_at_full_size(shape: Shape, dtype: torch.dtype) -> None:
    """Against the kernels of the CPU, in float64."""
    inputs = layer_inputs(shape, True, dtype)
    exact = value_and_gradients(capsops.capsule_routing, [x.double() for x in inputs])
    got = value_and_gradients(lambda *x: capsops.capsule_routing(*x, impl="cuda"), on_device(inputs))
    for name, want in exact.items():
        error = (got[name].cpu().double() - want).norm() / want.norm()
        assert error < 20 * torch.finfo(dtype).eps, f"{name}: {error}"


def test_same_bits_every_time() -> None:
    inputs = on_device(layer_inputs(MNIST, True, torch.float32))
    runs = [
        value_and_gradients(lambda *x: capsops.capsule_routing(*x, impl="cuda"), inputs) for _ in range(5)
    ]
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in run)


def test_tf32_follows_the_setting_of_torch() -> None:
    u, weight, _ = on_device(layer_inputs(MNIST, dtype=torch.float32))
    exact = reference.capsule_routing(u.double(), weight.double())
    errors = []
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        v = capsops.capsule_routing(u, weight, impl="cuda")
        errors.append((v.double() - exact).abs().max().item())
    assert errors[0] < 1e-5 < errors[1] < 1e-2


def test_on_a_stream_and_in_a_graph() -> None:
    u, weight, bias = on_device(layer_inputs(Shape(33, 100, 10, 16, 8), True, torch.float32))
    grad = torch.randn(33, 10, 16, device="cuda")

    def step() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (u, weight, bias)]
        v = capsops.capsule_routing(*leaves, impl="cuda")
        return v, *torch.autograd.grad(v, leaves, grad)

    want = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = step()
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(on_stream, want, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    u.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_on_a_device_that_is_not_the_current_one() -> None:
    u, weight, _ = on_device(layer_inputs(Shape(5, 9, 10, 16, 8), dtype=torch.float32))
    other = capsops.capsule_routing(u.to("cuda:1"), weight.to("cuda:1"), impl="cuda")
    assert torch.cuda.current_device() == 0
    assert torch.equal(other.cpu(), capsops.capsule_routing(u, weight, impl="cuda").cpu())


def test_peak_memory() -> None:
    """Less than a tenth of û, apart from the results."""
    u, weight, _ = on_device(layer_inputs(MNIST, dtype=torch.float32))
    leaves = [x.requires_grad_() for x in (u, weight)]
    capsops.capsule_routing(*leaves, impl="cuda").sum().backward()
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    capsops.capsule_routing(*leaves, impl="cuda").sum().backward()
    gradients = u.nbytes + weight.nbytes
    extra = torch.cuda.max_memory_allocated() - before - gradients
    assert extra < 128 * 1152 * 10 * 16 * 4 / 10


def auto_inputs(op: str, dtype: torch.dtype) -> list[Tensor]:
    u, weight, _ = on_device(layer_inputs(Shape(33, 100, 10, 16, 8), dtype=dtype))
    inputs = {"squash": (u,), "dynamic_routing": (reference.predictions(u, weight),)}.get(op, (u, weight))
    return [x.detach().requires_grad_() for x in inputs]


@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float64])
@pytest.mark.parametrize("op", ["squash", "predictions", "dynamic_routing", "capsule_routing", "couplings"])
def test_auto_takes_what_is_proved_on_this_gpu(op: str, dtype: torch.dtype) -> None:
    """Value and gradients have the same bits as those of the backend that is expected."""
    inputs = auto_inputs(op, dtype)
    shapes = () if op == "squash" else tuple(x.shape for x in inputs)
    backend = dispatch.chosen(op, "auto", inputs[0].device, dtype, shapes).name
    proved = dispatch.settle(inputs[0].device)["cuda"]
    assert proved["calls"]
    assert backend == ("reference" if dtype == torch.float64 else "cuda")
    results = []
    for impl in ("auto", backend):
        value = getattr(capsops, op)(*inputs, impl=impl)
        backward = op != "couplings"
        gradients = torch.autograd.grad(value.square().sum(), inputs) if backward else ()
        results.append((value, *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_auto_in_a_compiled_graph() -> None:
    u, weight = auto_inputs("capsule_routing", torch.float32)
    compiled = torch.compile(lambda u, w: 2 * capsops.capsule_routing(u, w), fullgraph=True)
    v = 2 * capsops.capsule_routing(u, weight)
    assert torch.equal(compiled(u, weight), v)
    compiled_grad, eager_grad = (
        torch.autograd.grad(f(u, weight).sum(), u)[0] for f in (compiled, capsops.capsule_routing)
    )
    assert torch.allclose(compiled_grad, 2 * eager_grad)


def test_float64_is_rejected() -> None:
    with pytest.raises(ValueError, match="impl='cuda' takes tensors of float32, bfloat16, float16"):
        capsops.squash(torch.ones(3, dtype=torch.float64, device="cuda"), impl="cuda")
