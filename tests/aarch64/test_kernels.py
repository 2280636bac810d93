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
from tests.capsops.compare import assert_all_close, assert_all_low_precision
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

# [outer, n, inner]: rows in a register, rows of registers, odd rows, long rows, columns.
SQUASH = [(35, 4, 1), (33, 8, 1), (17, 16, 1), (23, 5, 1), (2, 1000, 1), (3, 7, 19), (2000, 8, 1)]
LAYERS = [Shape(1, 33, 5, 7, 3), Shape(3, 9, 10, 16, 8), Shape(17, 5, 3, 5, 17), Shape(33, 7, 10, 16, 8)]
OPTIONS = [Options(0, bias=True), Options(3), Options(2, leaky=True, detach=True, bias=True)]


class Call(NamedTuple):
    """A call of the driver, and what it is compared with."""

    header: tuple[int, ...]  # op, B, I, J, D, K, iterations, leaky, detach, bias
    function: Callable[..., Tensor]
    inputs: list[Tensor | None]
    upstream: Tensor
    axes: tuple[int | None, ...] | None = None  # of the input capsules, for other orders of their sums
    couplings: bool = False


def calls(dtype: torch.dtype) -> Iterator[Call]:
    for outer, n, inner in SQUASH:
        s = torch.randn(outer, n, inner, dtype=torch.float64)
        if dtype is torch.float64:
            s[0] *= 1e-200
            s[1] = 0
        header = (0, outer, n, inner, *[0] * 6)
        yield Call(header, partial(reference.squash, dim=1), [s.to(dtype)], torch.randn(s.shape).to(dtype))
    for shape in LAYERS:
        u, weight, _ = layer_inputs(shape, dtype=dtype)
        upstream = torch.randn(shape[:4]).to(dtype)
        yield Call((1, *shape, *[0] * 4), reference.predictions, [u, weight], upstream)
    for shape, options in product(LAYERS, OPTIONS):
        u, weight, bias = layer_inputs(shape, options.bias, dtype)
        numbers = (options.iterations, options.leaky, options.detach, options.bias)
        upstream = torch.randn(shape.B, shape.J, shape.D).to(dtype)
        routing = partial(reference.capsule_routing, **options.keywords())
        couplings = options.iterations > 1
        yield Call((2, *shape, *numbers), routing, [u, weight, bias], upstream, (1, 0, None), couplings)
        routing = partial(reference.dynamic_routing, **options.keywords())
        u_hat = reference.predictions(u.double(), weight.double()).to(dtype)
        yield Call((2, *shape[:4], 0, *numbers), routing, [u_hat, bias], upstream, (1, None))


def couplings(call: Call, inputs: Sequence[Tensor | None]) -> Tensor:
    keywords = {name: call.function.keywords[name] for name in ("iterations", "leaky")}
    return reference.couplings(*inputs, **keywords)


def wanted(call: Call, inputs: list[Tensor | None], upstream: Tensor) -> dict[str, Tensor]:
    result = value_and_gradients(call.function, inputs, upstream)
    if call.couplings:
        result["couplings"] = couplings(call, inputs)
    return result


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
            dtype = call.inputs[0].dtype
            file.write(struct.pack("12q", op, DTYPES[dtype], threads, *numbers))
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
        for n, tensor in enumerate(call.inputs):
            if tensor is not None:
                result[f"gradient {n}"] = take(tensor)
            elif call.header[0] == 2:
                take(call.upstream[0])  # ∂β, which the kernels compute in any case
        if call.couplings:
            result["couplings"] = take(call.upstream.new_empty(call.header[1:4]))
        results.append(result)
    assert not data
    return results


@pytest.mark.parametrize("threads", [1, 3])
def test_float64(driver: Path, tmp_path: Path, threads: int) -> None:
    todo = [*calls(torch.float64)]
    for call, got in zip(todo, run_driver(driver, tmp_path, threads, todo), strict=True):
        assert_all_close(got, wanted(call, call.inputs, call.upstream))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(driver: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    todo = [*calls(dtype)]
    for call, got in zip(todo, run_driver(driver, tmp_path, 2, todo), strict=True):
        exact = wanted(call, [x if x is None else x.double() for x in call.inputs], call.upstream.double())
        lows = [wanted(call, call.inputs, call.upstream)]
        if call.axes:
            lows += runs_in_other_orders(call.function, call.inputs, call.axes, call.upstream)
        if call.couplings:
            for low in lows:
                low["couplings"] = lows[0]["couplings"]
        assert_all_low_precision(got, lows, exact)
