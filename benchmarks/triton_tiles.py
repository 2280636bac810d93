"""`python -m benchmarks.triton_tiles`: times other block sizes of the routed kernels on the GPU at hand.

For each precision and batch, forward and backward are timed with every candidate, by graph replay; what does
not compile or fit is listed with its reason. Each candidate compiles for seconds. The best entries are those
to write into capsops/backends/triton/launch_configs.py (ROUTED from the forward times, GRADIENT from the
backward ones).
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from triton.errors import TritonError

import capsops
from capsops.backends.triton import launch_configs
from capsops.backends.triton.launch import unit
from capsops.measuring.cases import Case
from capsops.measuring.precisions import PRECISIONS, matrix_precision
from capsops.measuring.timing import replay_seconds


def sensible(entry: launch_configs.Entry) -> bool:
    """A warp has 16 samples at most and 8 to 64 numbers a thread; there are at most 4 warps.

    With 8 warps and 128 numbers the gradient kernel, as Triton 3.6 compiles it for sm_90, faults on an H200.
    """
    numbers = entry.rows * entry.numbers // (32 * entry.warps)
    return entry.warps <= entry.rows // 8 and 8 <= numbers <= 64


def candidates(batch: int) -> list[launch_configs.Entry]:
    """Entries for a batch: 16 samples in a block if there are no more, else 32 or more.

    A multiprocessor has room for 8 warps, which may take 255 registers of a thread, or for 12 of 168.
    """
    grid = itertools.product(
        (16,) if batch <= 16 else (32, 64, 128), (32, 64, 128), (32,), (2, 4), (1, 2), ((8, None), (12, 168))
    )
    entries = [
        launch_configs.Entry(*block, warps, stages, resident // warps, registers)
        for *block, warps, stages, (resident, registers) in grid
    ]
    return [entry for entry in entries if sensible(entry)]


def measure(
    case: Case,
    entries: Sequence[launch_configs.Entry],
    device: str = "cuda",
    time: Callable[..., list[float]] = replay_seconds,
) -> list[dict[str, object]]:
    """Milliseconds of every entry."""
    kernels = SimpleNamespace(**capsops.dispatch.BACKENDS["triton"].functions)
    (u, weight), grad = case.inputs(device)
    u, weight = u.detach(), weight.detach()
    options = (case.iterations, False, False, True)  # leaky, detach, squash_output
    needs = (True, True, False)  # the gradients of u, weight and logits
    rows = []
    with matrix_precision(PRECISIONS[case.precision][1]):
        shape = u, unit(u), case.out_dim
        forward = partial(kernels.capsule_routing, u, weight, None, None, None, case.iterations, False, True)
        _, s = forward()
        backward = partial(kernels.capsule_routing_backward, grad, u, weight, None, None, s, *options, *needs)
        calls = {
            "forward": (forward, launch_configs.ROUTED, launch_configs.routed(*shape)),
            "backward": (backward, launch_configs.GRADIENT, launch_configs.kind(*shape)),
        }
        for entry in entries:
            row = {"case": str(case), "precision": case.precision, "entry": entry}
            for name, (call, table, kind) in calls.items():
                with mock.patch.dict(table, {kind: entry}):
                    try:
                        row[name] = statistics.median(time(call)) * 1e3
                    except (TritonError, RuntimeError) as error:  # does not compile, or does not fit
                        row[name], row[f"{name} failed"] = float("inf"), str(error).partition("\n")[0]
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 128, 512])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS)[:3])
    parser.add_argument("--out", type=Path, help="a JSON file for all rows")
    chosen = parser.parse_args()
    everything = []
    for precision, batch in itertools.product(chosen.precisions, chosen.batches):
        rows = measure(Case(batch, precision=precision), candidates(batch))
        for name in ("forward", "backward"):
            for row in sorted(rows, key=lambda row: row[name])[:3]:
                print(f"B={batch} {precision}: {name} {row[name]:.4f} ms {row['entry']}")
        everything += rows
        if chosen.out:
            chosen.out.parent.mkdir(parents=True, exist_ok=True)
            chosen.out.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
