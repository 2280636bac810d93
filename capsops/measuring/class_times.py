"""Times of every op by dtype and shape class, from which an order of backends follows."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

import capsops
from capsops.backends import BACKENDS
from capsops.backends.backend import NO_OPTIONS
from capsops.backends.device import Device
from capsops.measuring.cases import Case
from capsops.measuring.headline import TF32
from capsops.measuring.passes import BOTH, FORWARD, run
from capsops.measuring.precisions import matrix_precision
from capsops.measuring.timing import Race, clock
from capsops.proofs.order import FEW, LONG, USUAL, WIDE
from capsops.proofs.scope import DTYPES, OPS

SAMPLE, LENGTH, HOPELESS = 2e-3, 0.15, 6  # seconds of a sample and of a race


def cases(device: Device) -> dict[str, Case]:
    """A case for each shape class; smaller on a CPU, which is slower and takes one backend only."""
    inputs = 1152 if device.type == "cuda" else 72
    return {
        FEW: Case(16, inputs),
        USUAL: Case(128, inputs),
        WIDE: Case(16, inputs // 4, 196),
        LONG: Case(32, inputs // 16, 10, 40, 16),
    }


def class_times(device: Device, backends: Sequence[str], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each op, dtype and class: seconds of each backend and of the reference, the fastest first.

    By calls, as people train; inputs stay in the cache. The order is by the sum of both directions.
    """
    rows, where = [], torch.device(device.torch_name)
    for op, dtype in product(OPS, DTYPES):
        say(f"timing {op} in {dtype} …")
        for name, case in cases(device).items():
            precision = TF32 if dtype == "float32" and where.type == "cuda" else dtype
            chosen = Case(*case.sizes, precision=precision, op=op)
            able = [x for x in backends if not BACKENDS[x].why_declined(op, chosen.dtype, NO_OPTIONS)]
            seconds: dict[str, list[float]] = {impl: [] for impl in (*able, "reference")}
            for passes in (FORWARD,) if op == "couplings" else BOTH:
                for impl, median in _race(chosen, passes, list(seconds), where).items():
                    seconds[impl].append(median)
            order = sorted(seconds, key=lambda impl: sum(seconds[impl]))
            row = {"op": op, "dtype": dtype, "class": name, "case": str(chosen), "seconds": seconds}
            rows.append({**row, "order": order})
    return rows


def _race(case: Case, passes: str, impls: Sequence[str], device: torch.device) -> dict[str, float]:
    """Median seconds of a call of each."""
    inputs, grad = case.inputs(device)
    calls = {
        impl: partial(run, case.bind(partial(getattr(capsops, case.op), impl=impl)), passes, inputs, grad)
        for impl in impls
    }
    with matrix_precision(case.precision == TF32):
        return Race(calls, partial(clock, device=device), SAMPLE, LENGTH).run(HOPELESS)
