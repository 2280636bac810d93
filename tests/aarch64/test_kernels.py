"""The kernels of csrc/cpu on 64-bit Arm: cross-compiled, emulated, and compared with the reference.

Needs a cross compiler and an emulator (Debian: apt install g++-aarch64-linux-gnu qemu-user).
"""

import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from capsops import reference
from tests.capsops.cases import Options, Shape, layer_inputs, runs_in_other_orders, value_and_gradients
from tests.capsops.compare import assert_all_low_precision
from tests.capsops.routing_options import (
    Inputs,
    Routing,
    assert_same_results,
    axes_of_inputs,
    plain,
    tensors,
    wide,
)
from tests.test_build import ROOT, setup_py

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(MISSING), reason=f"not on the path: {', '.join(MISSING)}"),
]

# The numbers by which the kernels know the dtypes.
DTYPES = {torch.float64: 3, torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

HEADER_LENGTH = 21  # numbers of the driver's Header

# [outer, n, inner]: rows in a register, rows of registers, odd rows, long rows, columns.
SQUASH = [(35, 4, 1), (33, 8, 1), (17, 16, 1), (23, 5, 1), (2, 1000, 1), (3, 7, 19), (2000, 8, 1)]
LAYERS = [Shape(1, 33, 5, 7, 3), Shape(3, 9, 10, 16, 8), Shape(17, 5, 3, 5, 17), Shape(33, 7, 10, 16, 8)]
ROUTINGS = [
    Routing(Options(0, bias=True)),
    Routing(Options(3)),
    Routing(Options(2, leaky=True, detach=True, bias=True)),
]

# With more options.
OWN_WEIGHTS = [
    Routing(Options(2), squash_output=False),
    Routing(Options(3, bias=True), mask=True),
    Routing(Options(3, bias=True), "IJ"),
    Routing(Options(2, leaky=True), "BIJ", closed=True),
    Routing(Options(1, leaky=True), "BI1", closed=True),
    Routing(Options(0), "IJ", closed=True),
    Routing(Options(3, leaky=True, bias=True), "BIJ", closed=True, mask=True, squash_output=False),
]
SHARED_WEIGHT = [
    Routing(Options(3), shared=True),
    Routing(Options(0, bias=True), "BIJ", closed=True, mask=True, shared=True, squash_output=False),
    Routing(Options(2, detach=True), "IJ", closed=True, mask=True, shared=True),
]
LAYERS_WITH_OPTIONS = [Shape(2, 257, 11, 17, 8), Shape(33, 7, 11, 17, 9), Shape(33, 33, 10, 16, 8)]
CASES = [*product(LAYERS, ROUTINGS), *product(LAYERS_WITH_OPTIONS, [*OWN_WEIGHTS, *SHARED_WEIGHT])]

# Many numbers in an output capsule; and one sample with K = 1, which is for routing_capsule_simd.h, in whole
# registers and in half ones. Together with those above these reach all engines of csrc/cpu/routing.cpp.
FEW_SAMPLES = [Shape(4, 8, 2, 256, 2), Shape(1, 33, 41, 33, 1), Shape(1, 33, 40, 34, 1)]

# Which inputs get a gradient. The kernels compute ∂β in any case.
ALL, ONLY_U = (True, True, True, True, False), (True, False, True, False, False)


class Call(NamedTuple):
    """A call of the driver, and what it is compared with."""

    header: tuple[int, ...]  # without dtype and threads; zeros may be missing at the end
    function: Callable[..., Tensor]
    inputs: Inputs
    upstream: Tensor
    needs: Sequence[bool]
    axes: Sequence[int | None] | None = None  # of the input capsules, for other orders of their sums
    couplings: Callable[..., Tensor] | None = None


def calls(dtype: torch.dtype) -> Iterator[Call]:
    for outer, n, inner in SQUASH:
        s = torch.randn(outer, n, inner, dtype=torch.float64)
        if dtype is torch.float64:
            s[0] *= 1e-200
            s[1] = 0
        squash = partial(reference.squash, dim=1)
        yield Call((0, outer, n, inner), squash, [s.to(dtype)], torch.randn(s.shape).to(dtype), [True])
    for shape in LAYERS:
        u, weight, _ = layer_inputs(shape, dtype=dtype)
        upstream = torch.randn(shape[:4]).to(dtype)
        yield Call((1, *shape), reference.predictions, [u, weight], upstream, [True, True])
    for shape, routing in CASES:
        yield from routing_calls(shape, routing, dtype)


def routing_calls(shape: Shape, routing: Routing, dtype: torch.dtype) -> Iterator[Call]:
    for op, needs in (("capsule_routing", ALL), ("capsule_routing", ONLY_U), ("dynamic_routing", ALL)):
        yield routing_call(op, shape, routing, needs, dtype)


def routing_call(
    op: str, shape: Shape, routing: Routing, needs: tuple[bool, ...], dtype: torch.dtype
) -> Call:
    inputs = tensors(op, shape, routing, dtype)
    _, weight, bias, logits, _ = inputs
    K = 0 if weight is None else shape.K
    iterations, leaky, detach, _ = routing.options
    flags = (leaky, detach, routing.squash_output, routing.shared, bias is not None, routing.mask)
    sizes = [0, 0, 0] if logits is None else [*[1] * (3 - logits.dim()), *logits.shape]
    header = (2, *shape[:4], K, iterations, *flags, *sizes, needs[0], needs[1], needs[3])

    def couplings(u: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor | None) -> Tensor:
        keywords = {"logits": others[0], "mask": others[1], "iterations": iterations, "leaky": leaky}
        return reference.couplings(u, weight, bias, **keywords)

    return Call(
        header,
        plain(op, routing),
        inputs,
        torch.randn(shape.B, shape.J, shape.D).to(dtype),
        needs,
        axes_of_inputs(op, routing),
        couplings if K > 0 and (iterations > 1 or logits is not None) else None,
    )


def wanted(call: Call, inputs: Inputs, upstream: Tensor) -> dict[str, Tensor]:
    result = value_and_gradients(call.function, inputs, upstream, call.needs)
    if call.couplings:
        result["couplings"] = call.couplings(*inputs)
    return result


def plain_runs(call: Call) -> list[dict[str, Tensor]]:
    """What plain torch computes in the dtype of the call, for routing in several orders of its sums."""
    if call.axes is None:
        return [wanted(call, call.inputs, call.upstream)]
    runs = runs_in_other_orders(call.function, call.inputs, call.axes, call.upstream, call.needs)
    if call.couplings:
        none = [False] * len(call.inputs)
        others = runs_in_other_orders(call.couplings, call.inputs, call.axes, None, none, value_axis=1)
        for run, other in zip(runs, others, strict=True):
            run["couplings"] = other["value"]
    return runs


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver and the kernels, compiled as setup.py compiles them on that machine."""
    folder = tmp_path_factory.mktemp("aarch64")
    objects = setup_py.cpu_objects("aarch64", {})
    flags = objects.pop("bindings.o")[1]
    assert all(name.endswith(".baseline.o") for name in objects)
    flags = [flag for flag in flags if flag not in setup_py.includes()]
    objects["driver.o"] = (ROOT / "tests/aarch64/driver.cpp", flags)
    commands = [
        [COMPILER, *flags, "-c", str(source), "-o", str(folder / name)]
        for name, (source, flags) in objects.items()
    ]
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    while commands:
        running = [
            subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands[:jobs]
        ]
        commands = commands[jobs:]
        for process in running:
            errors = process.communicate()[1]
            assert process.returncode == 0, errors
            assert not errors  # no warnings either
    program = folder / "driver"
    link = [COMPILER, "-static", "-fopenmp", *(str(folder / name) for name in objects), "-o", str(program)]
    linked = subprocess.run(link, capture_output=True, text=True)
    assert linked.returncode == 0, linked.stderr
    return program


def run_driver(driver: Path, folder: Path, threads: int, todo: Sequence[Call]) -> list[dict[str, Tensor]]:
    """What the kernels compute, named as value_and_gradients names it."""
    with (folder / "inputs").open("wb") as file:
        for call in todo:
            op, *numbers = call.header
            numbers = [op, DTYPES[call.upstream.dtype], threads, *numbers]
            numbers += [0] * (HEADER_LENGTH - len(numbers))
            file.write(struct.pack(f"{HEADER_LENGTH}q", *numbers))
            for tensor in (*call.inputs, call.upstream):
                if tensor is not None:
                    file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    command = [EMULATOR, str(driver), str(folder / "inputs"), str(folder / "results")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    data = memoryview(bytearray((folder / "results").read_bytes()))
    results = []

    def take(like: Tensor) -> Tensor:
        nonlocal data
        part, data = data[: like.nbytes], data[like.nbytes :]
        return torch.frombuffer(part, dtype=like.dtype).view(like.shape)

    for call in todo:
        result = {"value": take(call.upstream)}
        for n, (tensor, needed) in enumerate(zip(call.inputs, call.needs, strict=True)):
            if tensor is not None and needed:
                result[f"gradient {n}"] = take(tensor)
        if call.couplings:
            result["couplings"] = take(call.upstream.new_empty(call.header[1:4]))
        results.append(result)
    assert not data
    return results


@pytest.mark.parametrize("threads", [1, 3])
def test_float64(driver: Path, tmp_path: Path, threads: int) -> None:
    todo = [*calls(torch.float64)]
    for call, got in zip(todo, run_driver(driver, tmp_path, threads, todo), strict=True):
        assert_same_results(got, wanted(call, call.inputs, call.upstream))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(driver: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    todo = [*calls(dtype)]
    for call, got in zip(todo, run_driver(driver, tmp_path, 2, todo), strict=True):
        exact = wanted(call, wide(call.inputs), call.upstream.double())
        assert_all_low_precision(got, plain_runs(call), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_samples(driver: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Their rounding errors vary too much by chance to be compared with those of plain torch.

    û is of length 1: large logits would make the errors grow. Sums have up to 1360 terms.
    """
    todo = []
    for shape, routing in product(FEW_SAMPLES, [*OWN_WEIGHTS, *SHARED_WEIGHT]):
        todo += routing_calls(shape, routing, dtype)
    for call in todo:
        call.inputs[0].div_(call.upstream.shape[-1] ** 0.5)
    dtype_of_sums = torch.promote_types(dtype, torch.float32)
    tolerance = torch.finfo(dtype).eps + 512 * torch.finfo(dtype_of_sums).eps
    for call, got in zip(todo, run_driver(driver, tmp_path, 2, todo), strict=True):
        want = wanted(call, wide(call.inputs), call.upstream.double())
        assert_same_results({name: x.double() for name, x in got.items()}, want, tolerance)
