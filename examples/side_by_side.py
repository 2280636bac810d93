"""Times two forms of the same calculation in turns, and measures their memory."""

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path


def high_water_mark(reset: bool = False) -> int | None:
    """The most bytes this process has had in memory, on Linux; else None. `reset`: counted from now on."""
    try:
        if reset:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, AttributeError, TypeError, StopIteration):
        return None


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes that a call takes at its peak, or None where the system does not tell."""
    before = high_water_mark(reset=True)
    call()
    after = high_water_mark()
    return None if before is None or after is None else after - before


def side_by_side(ours: Callable[[], object], plain: Callable[[], object], rounds: int = 9) -> str:
    """One line: the median of the times, and the memory, of both."""
    calls, seconds = {"capsops": ours, "plain PyTorch": plain}, {"capsops": [], "plain PyTorch": []}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    times = [statistics.median(samples) for samples in seconds.values()]
    text = (
        f"{1e3 * times[0]:.1f} ms, plain PyTorch {1e3 * times[1]:.1f} ms: {times[1] / times[0]:.1f} × as fast"
    )
    memory = [peak_memory(call) for call in calls.values()]
    if None in memory:
        return text
    kib = [max(size / 1024, 256) for size in memory]  # what the mark resolves
    ratio = kib[1] / kib[0]
    share = f"1/{ratio:.0f} of" if ratio >= 1.5 else f"{1 / ratio:.1f} times"
    return f"{text}; {kib[0] / 1024:.1f} MiB beside {kib[1] / 1024:.1f} MiB: {share} the memory"
