"""Where the time of a call goes: the seconds of each kernel, and what the floor allows it."""

import re
from collections import defaultdict
from collections.abc import Callable

import torch

from benchmarks.cases import RoutingCase
from benchmarks.gpu.floor import GRADIENTS, PASSES, REDUCTIONS, Ceilings, Work, least_seconds

CALLS = 10


def kernel_name(symbol: str) -> str:
    """Of a demangled symbol: without what it returns, its namespace and its parameters."""
    name = re.sub(r"\((int|bool)\)", "", symbol.removeprefix("void "))
    name = re.sub(r"\((?!anonymous).*", "", name)
    return re.sub(r"capsops::|\(anonymous namespace\)::", "", name)


def part_of(kernel: str) -> Work | None:
    """Which part of the algorithm a kernel of the CUDA implementation makes."""
    if kernel.startswith("gradients_kernel"):
        return GRADIENTS
    if kernel.startswith("passes_kernel"):
        return REDUCTIONS if re.search(r"\btrue\b|\b1>$", kernel) else PASSES
    return None


def kernel_seconds(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds on the device of one call, by kernel, the longest first."""
    call()
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize(device)
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if event.self_device_time_total > 0:
            seconds[kernel_name(event.key)] += event.self_device_time_total / 1e6 / CALLS
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def breakdown(
    call: Callable[[], object], case: RoutingCase, ceilings: Ceilings, tf32: bool, device: torch.device
) -> dict[str, float]:
    """`kernel NAME`: its seconds; `floor of NAME: UNIT`: the least that its part of the work takes."""
    found = {}
    for name, seconds in kernel_seconds(call, device).items():
        found[f"kernel {name}"] = seconds
        part = part_of(name)
        if part is not None:
            least, unit = least_seconds(part, case, ceilings, tf32)
            found[f"floor of {name}: {unit}"] = least
    return found
