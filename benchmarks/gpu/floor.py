"""The ceilings of a device, measured, and what they allow a routing kernel at best."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.cases import RoutingCase
from benchmarks.gpu.clock import device_clock
from benchmarks.passes import FORWARD

EXPONENTIALS_A_CLOCK = (
    16  # of a multiprocessor, on NVIDIA chips from sm_70 to sm_100 (CUDA C++ Programming Guide)
)


@dataclass(frozen=True)
class Ceilings:
    """Operations, bytes and exponentials per second."""

    bandwidth: float  # bytes read and written by a large copy
    bfloat16: float  # the best of large matrix products
    tf32: float
    float32: float  # without matrix units
    exponentials: float  # by the chip's clock and width; 0: unknown

    def products(self, dtype: str, tf32: bool) -> float:
        """The rate of what goes to matrix units in this mode."""
        return self.bfloat16 if dtype != "float32" else self.tf32 if tf32 else self.float32


def measured_ceilings(device: torch.device) -> Ceilings:
    """Measured by torch's copies and matrix products of random numbers, the best of a few."""
    large = device.type == "cuda"
    clock, n = device_clock(device), 8192 if large else 256

    def best(call: Callable[[], object]) -> float:
        clock(call, 3)
        return min(clock(call, 5) / 5 for _ in range(3))

    def product(dtype: torch.dtype, tf32: bool) -> float:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        with matrix_precision(tf32):
            return 2 * n**3 / best(partial(torch.mm, a, b))

    source = torch.randn((1 << 30 if large else 1 << 20), device=device)
    bandwidth = 2 * source.nbytes / best(partial(torch.empty_like(source).copy_, source))
    del source
    exponentials = 0.0
    if large:
        properties = torch.cuda.get_device_properties(device)
        clock_rate = getattr(properties, "clock_rate", 0) * 1e3  # kHz
        exponentials = properties.multi_processor_count * EXPONENTIALS_A_CLOCK * clock_rate
    return Ceilings(
        bandwidth,
        product(torch.bfloat16, False),
        product(torch.float32, True),
        product(torch.float32, False),
        exponentials,
    )


@contextmanager
def matrix_precision(tf32: bool) -> Iterator[None]:
    """Whether torch, and so capsops, may use TF32 in matrix products of float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Work:
    """A part of the algorithm: how often it does what, `later` being the passes with logits, T − 1.

    Each is a pair (times always, times for each later pass): products û, ∂u or ∂W; sums or dot products along
    û; exponentials of a coupling; readings or writings of u and W.
    """

    products: tuple[int, int]
    sums: tuple[int, int]
    exponentials: tuple[int, int]
    inputs: int


PASSES = Work((1, 1), (0, 2), (0, 1), 1)  # forward: the product, logits and the sum
REDUCTIONS = Work((0, 1), (0, 3), (0, 1), 1)  # backward: logits, a = û · ∂s and the sum of ∂b û
GRADIENTS = Work((3, 0), (1, 4), (0, 1), 2)  # û, ∂u and ∂W; logits, a and the two terms of ∂û


def times_by_unit(work: Work, case: RoutingCase, ceilings: Ceilings, tf32: bool) -> dict[str, float]:
    """Seconds that each unit of the device takes for its part, at its ceiling.

    û, ∂u and ∂W go to matrix units where the mode has them; logits and sums are multiply-adds of float32.
    """
    later = max(case.iterations - 1, 0)
    products, sums, exponentials = (
        always + each * later for always, each in (work.products, work.sums, work.exponentials)
    )
    numbers = case.batch * case.in_capsules * case.in_dim + (
        case.in_capsules * case.out_capsules * case.out_dim * case.in_dim
    )
    moved = work.inputs * numbers + case.batch * case.out_capsules * case.out_dim
    operations = 2 * case.predictions
    pairs = case.batch * case.in_capsules * case.out_capsules
    rate = ceilings.products(case.dtype, tf32)
    return {
        "matrix products": products * operations * case.in_dim / rate,
        "sums": sums * operations / ceilings.float32,
        "bytes": moved * getattr(torch, case.dtype).itemsize / ceilings.bandwidth,
        "exponentials": exponentials * pairs / ceilings.exponentials if ceilings.exponentials else 0.0,
    }


def longest(times: dict[str, float], one_unit: bool) -> tuple[float, str]:
    """The time of the unit that takes longest, and which it is; `one_unit` makes products and sums."""
    if one_unit:
        times = {**times, "sums": times["sums"] + times["matrix products"], "matrix products": 0.0}
    unit = max(times, key=times.__getitem__)
    return times[unit], unit


def least_seconds(work: Work, case: RoutingCase, ceilings: Ceilings, tf32: bool) -> tuple[float, str]:
    """The least time of a part of the work, and the unit that it is the least time of."""
    one_unit = ceilings.products(case.dtype, tf32) == ceilings.float32
    return longest(times_by_unit(work, case, ceilings, tf32), one_unit)


def floor_seconds(case: RoutingCase, passes: str, ceilings: Ceilings, tf32: bool) -> tuple[float, str]:
    """The least time of a call, and the unit that it is the least time of.

    Of each unit the work of all parts together. u and W are read once forward and once backward, though
    backward has two parts.
    """
    parts = [PASSES] if passes == FORWARD else [PASSES, replace(REDUCTIONS, inputs=0), GRADIENTS]
    times: dict[str, float] = {}
    for part in parts:
        for unit, seconds in times_by_unit(part, case, ceilings, tf32).items():
            times[unit] = times.get(unit, 0.0) + seconds
    return longest(times, ceilings.products(case.dtype, tf32) == ceilings.float32)
