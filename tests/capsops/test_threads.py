"""The same results in every run, in several Python threads and, to rounding, on any number of threads."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor

import capsops
from tests.capsops import cases
from tests.capsops.cases import Options, Shape, layer_inputs, routing_inputs, value_and_gradients
from tests.capsops.compare import assert_all_close, assert_close
from tests.capsops.routing_options import Routing, ours, skip_unless_supported, tensors
from tests.processes import run_python

# Large enough that the kernels start their threads; B = 1 and 3 do not fill a vector.
SHAPES = [
    Shape(1, 1000, 10, 16, 8),
    Shape(3, 301, 7, 5, 9),
    Shape(33, 50, 10, 16, 8),
    Shape(130, 7, 40, 16, 8),
]
OPTIONS = [Options(0, bias=True), Options(3, bias=True), Options(2, leaky=True, detach=True)]

CASES = [
    (SHAPES[0], OPTIONS[1]),
    (SHAPES[1], OPTIONS[2]),
    (SHAPES[2], OPTIONS[0]),
    (SHAPES[2], OPTIONS[1]),
    (SHAPES[3], OPTIONS[1]),
]


def everything(impl: str, shape: Shape, options: Options, dtype: torch.dtype) -> dict[str, Tensor]:
    """Values and gradients of all ops on inputs that are the same for every call."""
    torch.manual_seed(0)
    layer, routing = layer_inputs(shape, options.bias, dtype), routing_inputs(shape, options.bias, dtype)
    keywords = {"impl": impl, **options.keywords()}
    results = {
        "capsule_routing": value_and_gradients(partial(capsops.capsule_routing, **keywords), layer),
        "dynamic_routing": value_and_gradients(partial(capsops.dynamic_routing, **keywords), routing),
        "predictions": value_and_gradients(partial(capsops.predictions, impl=impl), layer[:2]),
        "squash": value_and_gradients(partial(capsops.squash, impl=impl), [routing[0]]),
        "squash of dim 1": value_and_gradients(partial(capsops.squash, dim=1, impl=impl), [routing[0]]),
        "couplings": {"value": capsops.couplings(*layer, impl=impl)},
    }
    return {f"{op}: {name}": x for op, result in results.items() for name, x in result.items()}


def assert_identical(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("shape", "options"), CASES, ids=str)
def test_runs_are_bitwise_the_same(impl: str, shape: Shape, options: Options, count: int) -> None:
    if impl == "reference":
        pytest.skip("its threads are torch's own")
    torch.set_num_threads(count)
    first = everything(impl, shape, options, torch.float32)
    for _ in range(2):
        assert_identical(everything(impl, shape, options, torch.float32), first)


@pytest.mark.parametrize(
    ("shape", "options"), [*CASES, *((shape, OPTIONS[1]) for shape in cases.SHAPES)], ids=str
)
def test_number_of_threads_changes_rounding_only(impl: str, shape: Shape, options: Options) -> None:
    """The other tests compare results of one thread with the reference."""
    if impl == "reference":
        pytest.skip("its threads are torch's own")
    single = everything(impl, shape, options, torch.float64)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert_all_close(everything(impl, shape, options, torch.float64), single, tolerance=1e-13)


ROUTINGS = [
    Routing(Options(3, bias=True), "IJ"),
    Routing(Options(2, leaky=True), "BI1", closed=True, mask=True),
    Routing(Options(3, bias=True), shared=True),
    Routing(Options(3, bias=True), "J", True, True, True, False),
]


def with_routing_options(impl: str, shape: Shape, routing: Routing, dtype: torch.dtype) -> dict[str, Tensor]:
    """Values and gradients of routing with these options, on inputs that are the same for every call."""
    torch.manual_seed(0)
    return {
        f"{op}: {name}": x
        for op in ("capsule_routing", "dynamic_routing")
        for name, x in value_and_gradients(
            ours(op, impl, routing), tensors(op, shape, routing, dtype)
        ).items()
    }


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_routing_options_on_any_number_of_threads(impl: str, shape: Shape, routing: Routing) -> None:
    """Two runs are bitwise the same; another number of threads changes rounding only."""
    if impl == "reference":
        pytest.skip("its threads are torch's own")
    skip_unless_supported(impl, routing.used(), torch.float64)
    single = with_routing_options(impl, shape, routing, torch.float64)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert_identical(*(with_routing_options(impl, shape, routing, torch.float32) for _ in range(2)))
        for name, tensor in with_routing_options(impl, shape, routing, torch.float64).items():
            assert_close(tensor, single[name], name, tolerance=1e-13, floor=1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_samples_do_not_affect_each_other(impl: str, options: Options) -> None:
    """A sample has the same result without the rest of its batch, to rounding."""
    u, weight, bias = layer_inputs(Shape(33, 20, 5, 16, 8), options.bias)
    function = partial(capsops.capsule_routing, impl=impl, **options.keywords())
    whole = function(u, weight, bias)
    for part in (slice(0, 1), slice(16, 19), slice(32, 33)):
        assert_all_close({"value": function(u[part], weight, bias)}, {"value": whole[part]}, tolerance=1e-13)


def test_several_python_threads_at_once(impl: str) -> None:
    torch.set_num_threads(2)
    jobs = [(shape, options) for shape in SHAPES for options in OPTIONS]
    inputs = {shape: layer_inputs(shape, bias=True) for shape in SHAPES}

    def job(shape: Shape, options: Options) -> dict[str, Tensor]:
        function = partial(capsops.capsule_routing, impl=impl, **options.keywords())
        return value_and_gradients(function, inputs[shape])

    want = [job(*each) for each in jobs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            for got, wanted in zip(pool.map(lambda each: job(*each), jobs), want, strict=True):
                assert_identical(got, wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_forked_workers_of_a_data_loader(impl: str) -> None:
    """A forked worker does not have the threads of its parent, so nothing in it may wait for them."""
    code = f"""
import torch, capsops
from torch.utils.data import DataLoader, Dataset

weight = torch.randn(200, 10, 16, 8)
images = torch.randn(8, 32, 200, 8)
layer = lambda u: capsops.capsule_routing(u, weight, impl={impl!r})

class Layer(Dataset):
    def __len__(self):
        return len(images)
    def __getitem__(self, n):
        return layer(images[n])

torch.set_num_threads(1)
want = layer(images[5])
torch.set_num_threads(2)
layer(images[0])  # starts the parent's threads
loader = DataLoader(Layer(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
assert torch.equal(list(loader)[5], want)
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_every_kernel_uses_as_many_threads_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("capsops._cpu", reason="the C++ extension is not built")
    names = ("squash", "predictions", "routing", "couplings")
    received = {}

    def spy(name: str) -> Callable:
        kernel = getattr(kernels, name)

        def recording(*arguments: int) -> None:
            received.setdefault(name, set()).add(arguments[-1])
            kernel(*arguments)

        return recording

    for name in (*names, *(f"{name}_backward" for name in names[:3])):
        monkeypatch.setattr(kernels, name, spy(name))
    torch.set_num_threads(3)
    everything("cpu", Shape(3, 5, 4, 3, 2), Options(2), torch.float32)
    assert len(received) == 7
    assert all(threads == {3} for threads in received.values()), received
