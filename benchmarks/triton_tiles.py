"""`python -m benchmarks.triton_tiles`: times other block sizes of the routed kernels on the GPU at hand.

For each precision and batch, forward and backward are timed with every candidate, by graph replay; what does
not compile or fit is listed with its reason. Each candidate compiles for seconds. The best entries are those
to write into capsops/backends/triton/launch_configs.py (ROUTED from the forward times, GRADIENT from the
backward ones).
"""

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from triton.errors import TritonError

import capsops
from benchmarks.cases import RoutingCase
from benchmarks.triton_resources import PRECISIONS
from capsops.backends.triton import launch_configs
from capsops.backends.triton.launch import unit

ROWS = (16, 32, 64, 128)


def sensible(entry: launch_configs.Entry) -> bool:
    """A warp has 16 samples at most and 8 to 64 numbers a thread; there are at most 4 warps.

    With 8 warps and 128 numbers the gradient kernel, as Triton 3.6 compiles it for sm_90, faults on an H200.
    """
    numbers = entry.rows * entry.numbers // (32 * entry.warps)
    return entry.warps <= entry.rows // 8 and 8 <= numbers <= 64


def candidates(batch: int) -> list[launch_configs.Entry]:
    """Entries for a batch: 16 samples in a block where there are no more, else 32 or more."""
    rows = [rows for rows in ROWS if (rows == 16) == (batch <= 16)]
    grid = itertools.product(rows[:1] if batch <= 16 else rows, (32, 64, 128), (32,), (2, 4), (1, 2))
    return [entry for entry in itertools.starmap(launch_configs.Entry, grid) if sensible(entry)]


def milliseconds(call: Callable[[], object], replays: int = 20) -> float:
    """Median time of a replay of the call as a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[replays // 2]


def once(call: Callable[[], object]) -> float:
    """Compiles what the call needs."""
    call()
    return 0.0


def measure(
    case: RoutingCase,
    precision: str,
    programs: int,
    entries: Sequence[launch_configs.Entry],
    time: Callable = milliseconds,
) -> list[dict[str, object]]:
    """Times of every entry."""
    kernels = SimpleNamespace(**capsops.dispatch.BACKENDS["triton"].functions)
    dtype, tf32 = PRECISIONS[precision]
    (u, weight), grad = case.inputs("cuda")
    u, weight, grad = (x.detach().to(dtype) for x in (u, weight, grad))
    torch.backends.cuda.matmul.allow_tf32 = tf32
    kind = launch_configs.kind(unit(u), case.batch, case.out_dim, case.in_dim)

    options = (case.iterations, False, False, True)  # leaky, detach, squash_output

    def forward() -> object:
        return kernels.capsule_routing(u, weight, None, case.iterations, False, True)

    def backward() -> object:
        return kernels.capsule_routing_backward(grad, u, weight, s, *options, True, True)

    found = []
    with mock.patch.object(launch_configs, "PROGRAMS", programs):
        _, s = kernels.capsule_routing(u, weight, None, case.iterations, False, True)
        for entry in entries:
            row: dict[str, object] = {"case": str(case), "precision": precision, "programs": programs}
            row["entry"] = entry
            for call, table in ((forward, launch_configs.ROUTED), (backward, launch_configs.GRADIENT)):
                with mock.patch.dict(table, {kind: entry}):
                    try:
                        row[call.__name__] = time(call)
                    except (TritonError, RuntimeError) as error:  # does not compile, or does not fit
                        row[call.__name__] = float("inf")
                        row[f"{call.__name__} failed"] = str(error).partition("\n")[0]
            found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 128, 512])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS)[:3])
    parser.add_argument(
        "--programs", nargs="+", type=int, default=[launch_configs.PROGRAMS], help="per multiprocessor"
    )
    parser.add_argument(
        "--compile", help="fill Triton's cache with a share of the entries, such as 1/8, and stop"
    )
    parser.add_argument("--out", type=Path, help="a JSON file for all rows")
    parser.add_argument("--plan", action="store_true", help="say what would be measured, and stop")
    chosen = parser.parse_args()
    cases = list(itertools.product(chosen.programs, chosen.precisions, chosen.batches))
    count = sum(len(candidates(batch)) for _, _, batch in cases)
    print(f"{len(cases)} cases, {count} entries in all, each timed forward and backward")
    if chosen.plan:
        print(
            *(f"B={batch} {precision} {programs} programs" for programs, precision, batch in cases), sep="\n"
        )
        return
    if chosen.compile:
        share, shares = map(int, chosen.compile.split("/"))
        for precision, batch in itertools.product(
            chosen.precisions, {min(batch, 128) for batch in chosen.batches}
        ):
            measure(
                RoutingCase(batch), precision, launch_configs.PROGRAMS, candidates(batch)[share::shares], once
            )
        return
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
    everything = []
    for programs, precision, batch in cases:
        rows = measure(RoutingCase(batch), precision, programs, candidates(batch))
        everything += rows
        for name in ("forward", "backward"):
            for row in sorted(rows, key=lambda row: row[name])[:3]:
                print(f"B={batch} {precision} {programs} programs: {name} {row[name]:.4f} ms {row['entry']}")
        if chosen.out:
            chosen.out.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
