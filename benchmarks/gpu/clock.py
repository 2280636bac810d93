"""Timing on a device: events instead of the wall clock, graph replay, inputs that are not in the cache."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Call = Callable[[], object]
FEWEST_SETS, MOST_SETS = 2, 16
WARM_UP_CALLS = 3


def device_clock(device: torch.device) -> Callable[[Call, int], float]:
    """Seconds that so many calls take on the device, from before the first to the end of the last."""

    def by_events(call: Call, calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def by_wall(call: Call, calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return time.perf_counter() - begin

    return by_events if device.type == "cuda" else by_wall


class HasInputs(Protocol):
    """A case that makes its inputs on a device: tensors that require gradients, and an upstream gradient."""

    def inputs(self, device: str) -> tuple[tuple[Tensor, ...], Tensor]: ...


def input_sets(case: HasInputs, device: torch.device) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    """Copies of a case's inputs, so many that one round of them is twice the device's last-level cache."""
    inputs, grad = case.inputs(str(device))
    size = sum(x.nbytes for x in (*inputs, grad))
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    sets = min(max(-(-2 * cache // size), FEWEST_SETS), MOST_SETS)
    copies = [
        (tuple(x.detach().clone().requires_grad_() for x in inputs), grad.clone()) for _ in range(sets - 1)
    ]
    return [(inputs, grad), *copies]


def in_turns(call: Callable[..., object], sets: Sequence[tuple]) -> Call:
    """One call for each set of inputs."""

    def together() -> None:
        for inputs, grad in sets:
            call(inputs, grad)

    return together


def captured(call: Call, device: torch.device) -> Call:
    """The replay of a CUDA graph of `call`, which is first run outside it, on a stream of its own."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
