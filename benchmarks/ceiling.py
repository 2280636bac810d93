"""The machine's float32 ceiling, measured: operations per second on the threads that torch uses."""

import time
from functools import lru_cache
from typing import NamedTuple

import torch


class Ceiling(NamedTuple):
    """Attained floating-point operations per second, and by what they were attained."""

    flops: float
    how: str


def _by_registers(seconds: float, threads: int) -> Ceiling | None:
    """Multiply-adds on registers only, in the kernels' own instruction set; None without that loop."""
    try:
        from capsops import _cpu
    except ImportError:
        return None
    loop = getattr(_cpu, "fma_flops", None)
    if loop is None:
        return None
    return Ceiling(max(loop(seconds, threads) for _ in range(20)), f"FMA loop on registers, {_cpu.isa()}")


def _by_products(seconds: float) -> Ceiling:
    """The best of torch's own float32 matrix products: what plain tools attain, below the ceiling."""
    best = Ceiling(0.0, "")
    for m, k, n in ((512, 512, 512), (1024, 1024, 1024), (2048, 1024, 1024)):
        a, b, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            begin = time.perf_counter()
            torch.mm(a, b, out=out)
            flops = 2 * m * k * n / (time.perf_counter() - begin)
            best = max(best, Ceiling(flops, f"torch.mm [{m}, {k}] @ [{k}, {n}]"))
    return best


@lru_cache(maxsize=1)
def measured_ceiling(threads: int) -> Ceiling:
    """The ceiling for `threads` threads, which are torch's at this moment. Measured once in a process."""
    return _by_registers(0.05, threads) or _by_products(0.3)
