"""The ceilings of a device, measured, and what they allow a routing kernel at best."""

from collections.abc import Mapping
from functools import partial

import torch

from capsops.measuring.cases import Case
from capsops.measuring.ceiling import product_flops
from capsops.measuring.operations import operations
from capsops.measuring.passes import FORWARD
from capsops.measuring.precisions import PRECISIONS, matrix_precision
from capsops.measuring.timing import fastest

# Of a multiprocessor, on NVIDIA chips from sm_70 to sm_100 (CUDA C++ Programming Guide).
EXPONENTIALS_A_CLOCK = 16


def measured_ceilings(device: torch.device) -> dict[str, float]:
    """Bytes of a large copy, operations of large matrix products, and exponentials per second.

    Exponentials are those of the chip's clock and width, 0 where these are unknown; the rest is measured.
    """
    large = device.type == "cuda"
    n, exponentials, numbers = 8192 if large else 256, 0.0, 1 << 20
    if large:  # 4 GiB, or on a small GPU a sixteenth of its memory
        numbers = min(1 << 30, torch.cuda.get_device_properties(device).total_memory // 64)
    source = torch.randn(numbers, device=device)
    bandwidth = 2 * source.nbytes / fastest(partial(torch.empty_like(source).copy_, source), device)
    del source
    rates = {}
    for name, (dtype, tf32) in PRECISIONS.items():
        with matrix_precision(tf32):
            rates[name] = product_flops(n, dtype, device)
    if large:
        properties = torch.cuda.get_device_properties(device)
        clock_rate = getattr(properties, "clock_rate", 0) * 1e3  # kHz
        exponentials = properties.multi_processor_count * EXPONENTIALS_A_CLOCK * clock_rate
    return {"bandwidth": bandwidth, **rates, "exponentials": exponentials}


def floor_seconds(case: Case, passes: str, ceilings: Mapping[str, float]) -> tuple[float, str]:
    """The least time of a call, and the unit of the device that needs it.

    û, ∂u and ∂W go to matrix units where the mode has them; logits and sums are multiply-adds of float32.
    u and W are read, and v written, once forward; backward reads them and writes their gradients.
    """
    work, (B, I, J, D, K) = operations(case, passes), case.sizes  # noqa: E741
    numbers = (1 if passes == FORWARD else 3) * (B * I * K + I * J * D * K + B * J * D)
    times = {
        "matrix products": work.products / ceilings[case.precision],
        "sums": work.sums / ceilings["float32"],
        "bytes": numbers * case.dtype.itemsize / ceilings["bandwidth"],
        "exponentials": work.exponentials / (ceilings["exponentials"] or torch.inf),
    }
    if case.precision == "float32":  # one unit makes both
        times["sums"] += times.pop("matrix products")
    unit = max(times, key=times.__getitem__)
    return times[unit], unit
