"""The machine's float32 ceiling, measured: operations per second on the threads that torch uses."""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from capsops.backends import extension
from capsops.measuring.timing import CPU, fastest


class Ceiling(NamedTuple):
    """Attained floating-point operations per second, and how they were attained."""

    flops: float
    how: str
    isa: str = "none: capsops._cpu is not built"  # the instruction set of the kernels


def product_flops(n: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> float:
    """Operations per second of torch's product of two n × n matrices of random numbers."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / fastest(partial(torch.mm, a, b), device)


@lru_cache(maxsize=1)
def measured_ceiling() -> Ceiling:
    """The ceiling for the threads that torch uses at the first call. Measured once in a process.

    Multiply-adds on registers, in the instruction set of the kernels; without the extension a matrix product,
    which stays below the ceiling.
    """
    _cpu: Any
    _cpu, _ = extension.load("cpu")
    if _cpu is None:
        return Ceiling(max(product_flops(1024) for _ in range(5)), "torch.mm, 1024 × 1024")
    flops = max(_cpu.fma_flops(0.05, torch.get_num_threads()) for _ in range(20))
    return Ceiling(flops, f"FMA loop on registers, {_cpu.isa()}", _cpu.isa())
