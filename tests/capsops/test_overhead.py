"""How much Python a call of the CUDA kernels takes: function calls are counted, which no load disturbs."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch

import capsops
from benchmarks.cuda_stub import calls_on_the_cpu
from tests.capsops.cases import Shape, layer_inputs

# Of what is counted here, with room for a few more; see benchmarks/test_overhead_cuda_stub.py for times.
MOST_FORWARD, MOST_WITH_BACKWARD = 75, 165


@pytest.fixture
def extension() -> Iterator[SimpleNamespace]:
    """Kernels that do nothing, take a workspace of 1000 bytes, and count how often they are called."""
    kernels = SimpleNamespace(calls=0)

    def kernel(*args: Any) -> int:
        kernels.calls += 1
        return 1000

    kernels.routing = kernels.routing_backward = kernel
    with calls_on_the_cpu(kernels):
        yield kernels


def count(call: Callable[[], object]) -> int:
    """How many functions are called in files of capsops, or from there in C."""
    calls, folder = 0, str(Path(capsops.__file__).parent)

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call") and frame.f_code.co_filename.startswith(folder)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return calls


def test_few_functions_are_called_around_a_kernel(extension: SimpleNamespace) -> None:
    u, weight, bias = layer_inputs(Shape(2, 3, 4, 5, 6), bias=True, dtype=torch.float32)
    leaves = [x.detach().requires_grad_() for x in (u, weight, bias)]

    def forward() -> None:
        with torch.no_grad():
            capsops.capsule_routing(*leaves)

    def step() -> None:
        v = capsops.capsule_routing(*leaves)
        torch.autograd.grad(v, leaves, torch.ones_like(v))

    step(), forward()
    extension.calls = 0
    calls, with_backward = count(forward), count(step)
    assert extension.calls == 3  # each kernel once: how much workspace it takes is known
    assert calls <= MOST_FORWARD
    assert with_backward <= MOST_WITH_BACKWARD


def test_a_longer_workspace_is_allocated_once(extension: SimpleNamespace) -> None:
    u, weight = torch.randn(2, 3, 6), torch.randn(3, 4, 5, 6)
    for calls in (2, 3, 4):
        capsops.capsule_routing(u, weight)
        assert extension.calls == calls
