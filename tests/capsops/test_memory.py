"""Peak memory of the fused layer, and results that do not depend on uninitialised memory."""

import os

import pytest
import torch

import capsops
from capsops.backends.backend import LOGITS, SHARED
from tests.capsops.cases import FEW_OPTIONS, Shape, layer_inputs, routing_inputs, value_and_gradients
from tests.capsops.routing_options import skip_unless_supported
from tests.processes import run_python
from tests.tiers import fast_only

SHAPE = Shape(512, 1024, 32, 4, 4)

PEAK = """
import torch, capsops

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def step(u, weight, bias, logits):
    tensors = (u, bias) if weight is None else (u, weight, bias)
    routing = capsops.dynamic_routing if weight is None else capsops.capsule_routing
    v = routing(*tensors, logits=logits, iterations=3, detach={detach}, impl={impl!r})
    return v, *torch.autograd.grad(v, [*tensors, *([] if logits is None else [logits])], upstream)

def leaves(B, I, J, D, K):
    sizes = (B, I, K), {weight}, (J, D), {logits}
    return [None if s is None else torch.randn(s, requires_grad=True) for s in sizes]

torch.set_num_threads({threads})
B, I, J, D, K = {shape}
upstream = torch.randn(2, J, D)
step(*leaves(2, 3, J, D, K))  # loads the code and starts the threads
upstream = torch.randn(B, J, D)
inputs = leaves(B, I, J, D, K)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
results = step(*inputs)
print(status("VmHWM") - before - sum(x.nbytes for x in results))
"""


def peak(impl: str, shape: Shape, detach: bool, weight: str = "(I, J, D, K)", logits: str = "None") -> int:
    """Peak memory of a forward and a backward pass, in bytes beyond inputs, result and gradients.

    `weight` and `logits` are their shapes, or "None"; without a weight u is û, the same for all outputs.
    """
    code = PEAK.format(
        shape=tuple(shape),
        impl=impl,
        detach=detach,
        weight=weight,
        logits=logits,
        threads=os.cpu_count() or 1,
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_peak_of_the_reference_is_above_the_predictions() -> None:
    """It stores û several times; this tests the measurement."""
    shape = SHAPE._replace(I=128)
    predictions = 4 * shape.B * shape.I * shape.J * shape.D
    assert peak("reference", shape, detach=False) > 2 * predictions


@pytest.mark.parametrize("detach", [False, True])
def test_peak_is_far_below_the_couplings(impl: str, detach: bool) -> None:
    """Neither û nor the couplings are stored: the bound is an eighth of the couplings' 64 MiB.

    A few tensors of B · J · D numbers, a quarter of a MiB each, are allowed for each pass.
    """
    if impl == "reference":
        pytest.skip("the reference stores û by definition")
    couplings = 4 * SHAPE.B * SHAPE.I * SHAPE.J
    assert peak(impl, SHAPE, detach) < couplings / 8


@pytest.mark.parametrize("detach", fast_only([False], [False, True]))
@pytest.mark.parametrize(
    ("weight", "logits"),
    [
        ("(I, J, D, K)", "(I, J)"),
        ("(J, D, K)", "None"),
        ("(J, D, K)", "(I, J)"),
        ("None", "(I, J)"),
    ],
)
def test_peak_with_routing_options(impl: str, weight: str, logits: str, detach: bool) -> None:
    """Neither the couplings nor, with a shared weight, numbers of each pair of capsules are stored."""
    if impl == "reference":
        pytest.skip("the reference stores the couplings by definition")
    skip_unless_supported(impl, frozenset((LOGITS, SHARED)))
    couplings = 4 * SHAPE.B * SHAPE.I * SHAPE.J
    assert peak(impl, SHAPE, detach, weight, logits) < couplings / 8


SHAPES = [Shape(5, 9, 3, 5, 3), Shape(17, 33, 10, 16, 8), Shape(2, 7, 60, 32, 4)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("options", FEW_OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_element_is_written(impl: str, dtype: torch.dtype, shape: Shape, options: tuple) -> None:
    with capsops.use_impl(impl):
        results = [
            value_and_gradients(
                lambda *x: capsops.capsule_routing(*x, **options.keywords()),
                layer_inputs(shape, options.bias, dtype),
            ),
            value_and_gradients(
                lambda *x: capsops.dynamic_routing(*x, **options.keywords()),
                routing_inputs(shape, options.bias, dtype),
            ),
            value_and_gradients(capsops.predictions, layer_inputs(shape, dtype=dtype)[:2]),
            value_and_gradients(capsops.squash, [torch.randn(shape.B, shape.J, shape.D).to(dtype)]),
            {"couplings": capsops.couplings(*layer_inputs(shape, options.bias, dtype))},
        ]
    for result in results:
        for name, tensor in result.items():
            assert tensor.isfinite().all(), name


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [Shape(0, 3, 2, 4, 5), Shape(2, 0, 2, 4, 5), Shape(2, 3, 2, 4, 0)], ids=str)
def test_calls_with_empty_inputs_write_their_results(impl: str, shape: Shape) -> None:
    inputs = layer_inputs(shape, bias=True)
    results = value_and_gradients(lambda *x: capsops.capsule_routing(*x, impl=impl), inputs)
    for name, tensor in results.items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("batch", [1, 3, 17])
def test_nothing_remains_of_an_earlier_call(impl: str, batch: int) -> None:
    """NaN with D = 8, then numbers with D = 7: their workspaces have the same size, so malloc reuses it."""
    full, short = (
        [*layer_inputs(shape, True, torch.bfloat16), *routing_inputs(shape, dtype=torch.bfloat16)[:1]]
        for shape in (Shape(batch, 5, 2, 8, 1), Shape(batch, 5, 2, 7, 1))
    )
    full = [torch.full_like(x, torch.nan) for x in full]
    calls = (
        lambda u, weight, bias, u_hat: (capsops.capsule_routing, [u, weight, bias]),
        lambda u, weight, bias, u_hat: (capsops.dynamic_routing, [u_hat, bias]),
        lambda u, weight, bias, u_hat: (capsops.predictions, [u, weight]),
    )
    with capsops.use_impl(impl):
        for call in calls:
            for _ in range(3):
                value_and_gradients(*call(*full))
                for name, tensor in value_and_gradients(*call(*short)).items():
                    assert tensor.isfinite().all(), name
        capsops.couplings(*full[:3])
        assert capsops.couplings(*short[:3]).isfinite().all()
    for u, weight, _, u_hat in (full, short):
        gradients = torch.ops.capsops.predictions_backward(u_hat, u, weight, True, True, impl)
    assert all(x.isfinite().all() for x in gradients)


WORKSPACE = """
import ctypes
import torch, capsops
from tests.capsops.cases import *
from tests.capsops.test_memory import SHAPES

M_PERTURB = -6  # of malloc.h

def digest():
    torch.manual_seed(0)
    for shape in SHAPES:
        for options in FEW_OPTIONS:
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                layer = layer_inputs(shape, options.bias, dtype)
                routing = routing_inputs(shape, options.bias, dtype)
                keywords = options.keywords() | {{"impl": {impl!r}}}
                results = value_and_gradients(lambda *x: capsops.capsule_routing(*x, **keywords), layer)
                yield [x.double().sum().item() for x in results.values()]
                results = value_and_gradients(lambda *x: capsops.dynamic_routing(*x, **keywords), routing)
                yield [x.double().sum().item() for x in results.values()]
                yield capsops.couplings(*layer, impl={impl!r}).double().sum().item()

for byte in (1, 120):  # memory of 0xfe and of 0x87
    assert ctypes.CDLL(None).mallopt(M_PERTURB, byte) == 1
    print(list(digest()))
"""


def check_workspace(impl: str) -> None:
    """Asserts that results are the same for two bytes with which glibc fills the memory from malloc."""
    done = run_python(
        "-c",
        WORKSPACE.format(impl=impl),
        fresh=True,
        MALLOC_MMAP_THRESHOLD_=str(32 << 20),
        GLIBC_TUNABLES="glibc.malloc.tcache_count=0",
    )
    assert done.returncode == 0, done.stderr
    assert "nan" not in done.stdout
    first, second = done.stdout.splitlines()
    assert first == second


def test_workspace_is_not_read_before_it_is_written() -> None:
    check_workspace("auto")


@pytest.mark.slow
def test_workspace_of_the_reference_is_not_read_before_it_is_written() -> None:
    check_workspace("reference")
