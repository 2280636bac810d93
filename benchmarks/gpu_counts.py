"""`python -m benchmarks.gpu_counts`: what each kernel takes of a multiprocessor, read without a GPU.

python -m benchmarks.gpu_counts [--json FILE] [--backend cuda triton] [--precision tf32] [--kernel later]

    counts the launches of routing on the paper's layer at B = 128: registers, spills, blocks resident, the
    instructions of the inner loops, and cycles of a multiprocessor for 32 samples and one input capsule, in
    the model of benchmarks/gpu/cycles.py; from these, microseconds of forward and backward

python -m benchmarks.gpu_counts --cubin FILE [--function NAME] [--warps 8]

    lists the loops of the kernels in any cubin: instructions by kind, and cycles of a turn
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.gpu import counts, cycles, flow, launches, objects, predictions, sass, triton_launches
from benchmarks.gpu.count_limits import broken
from benchmarks.gpu.counts import Count
from benchmarks.gpu.launches import BACKWARD, FORWARD
from benchmarks.machine import provenance
from capsops.measuring.cases import Case

CASE = Case(128)  # I = 1152, J = 10, D = 16, K = 8, T = 3
CUDA, TRITON = "cuda", "triton"
TURNS = 12  # of a loop, of which the first ones fill the pipes


@dataclass(frozen=True)
class Row:
    """A step of a call, and how often it runs."""

    backend: str
    op: str
    precision: str
    times: int
    count: Count

    @property
    def title(self) -> str:
        return f"{self.op}, {self.count.role}" + (f" ({self.count.kernel})" if self.backend == TRITON else "")


def units(case: Case) -> float:
    """How often there are 32 samples and one input capsule."""
    return case.batch / counts.SAMPLES * case.in_capsules


def count_call(op: str, precision: str, wanted: Sequence[str] = (), backend: str = CUDA) -> list[Row]:
    """The steps of a call in their order. Steps of one kernel in the same role are taken to be alike."""
    module = launches if backend == CUDA else triton_launches
    prepared: dict[str, counts.Kernel] = {}
    rows: dict[tuple[str, str], Row] = {}
    for launch, function, usage in module.with_kernels(op, precision, CASE):
        kernel = prepared.setdefault(launch.name, counts.Kernel(function, usage))
        key = launch.name, kernel.role_of(launch)
        if wanted and not any(part in f"{op}, {key[1]}" for part in wanted):
            continue
        row = rows.get(key)
        count = row.count if row else kernel.count(launch)
        rows[key] = Row(backend, op, precision, row.times + 1 if row else 1, count)
    return list(rows.values())


def _count(arguments: tuple[str, str, Sequence[str], str]) -> list[Row]:
    return count_call(*arguments)


def microseconds(rows: Sequence[Row], backend: str, op: str, precision: str) -> float:
    wanted = backend, op, precision
    steps = [
        row.count for row in rows if (row.backend, row.op, row.precision) == wanted for _ in range(row.times)
    ]
    launched = len(steps)
    if backend == CUDA:  # of which several steps share a launch
        launched = len(launches.recorded(op, precision, CASE, cooperative=True))
    return predictions.microseconds(steps, launched)


def per_unit(row: Row) -> dict[str, float]:
    """What a multiprocessor takes for 32 samples and one input capsule."""
    count, whole = row.count, units(CASE)
    return {
        "inner_instructions": count.per_unit(sum(count.inner_instructions.values()), whole),
        "inner_cycles": count.per_unit(count.inner_cycles, whole),
        "cycles": count.per_unit(count.cycles, whole),
    }


def table(rows: Sequence[Row]) -> Iterator[str]:
    heads = ("backend", "precision", "step", "times", "registers", "spills", "warps", "resident", "blocks")
    heads += ("instructions", "inner cycles", "cycles", "µs", "stored KB")
    yield "\t".join(heads)
    for row in rows:
        count, numbers = row.count, per_unit(row)
        cells: list[object] = [row.backend, row.precision, row.title, row.times]
        cells += [count.registers, count.spills, count.warps, count.resident, count.blocks]
        cells += [f"{number:.0f}" for number in numbers.values()]
        cells += [f"{count.cycles / predictions.GIGAHERTZ / 1e3:.1f}", count.stored_bytes >> 10]
        yield "\t".join(map(str, cells))


def kinds(rows: Sequence[Row]) -> Iterator[str]:
    """The instructions of the inner loops by kind, for 32 samples and one input capsule."""
    for row in rows:
        if row.count.role == counts.OTHER:
            continue
        listed = [
            f"{row.count.per_unit(n, units(CASE)):.0f} {kind}"
            for kind, n in list(row.count.inner_instructions.items())[:12]
        ]
        yield f"{row.backend}, {row.precision}, {row.title}: {', '.join(listed)}"
        if row.count.role == counts.LATER and row.count.straight_line_cycles:
            yield f"  {row.count.straight_line_cycles:.0f} cycles straight through the code of these loops"


def record(rows: Sequence[Row], times: dict[str, float]) -> dict[str, Any]:
    """What the JSON file has."""
    return {
        **provenance([sys.executable, "-m", "benchmarks.gpu_counts", *sys.argv[1:]]),
        "nvcc": objects.nvcc_version(),
        "case": asdict(CASE),
        "assumed": {
            "gigahertz": predictions.GIGAHERTZ,
            "grid_barrier_microseconds": predictions.GRID_BARRIER,
            "launch_microseconds": predictions.LAUNCH,
        },
        "microseconds": {name: round(value, 1) for name, value in times.items()},
        "steps": [
            {
                "backend": row.backend,
                "op": row.op,
                "precision": row.precision,
                "times": row.times,
                **asdict(row.count),
                "per_32_samples_and_input_capsule": {k: round(v, 1) for k, v in per_unit(row).items()},
            }
            for row in rows
        ],
    }


def count_all(backends: Sequence[str], precisions: Sequence[str], wanted: Sequence[str]) -> list[Row]:
    if CUDA in backends:
        for precision in precisions:
            objects.recorder(precision)  # compiles on all cores
    jobs = [
        (op, precision, wanted, backend)
        for backend in backends
        for precision in precisions
        for op in (FORWARD, BACKWARD)
    ]
    with ProcessPoolExecutor() as pool:
        return [row for rows in pool.map(_count, jobs) for row in rows]


def turn_cycles(turn: Sequence[sass.Instruction], warps: int) -> tuple[float, float]:
    """Cycles of a turn once the loop runs, and instructions issued a cycle."""
    steps = [cycles.step(instruction) for instruction in turn]
    first, every = (cycles.simulate([steps * n] * warps) for n in (TURNS // 3, TURNS))
    more = every.cycles - first.cycles
    return more / (TURNS - TURNS // 3), (every.issued - first.issued) / more


def print_loops(cubin: Path, wanted: str, warps: int) -> None:
    usages, functions = sass.usages(cubin), sass.functions(cubin)
    names = [name for name in functions if wanted in name]
    if not names:
        raise SystemExit(f"{cubin} has no function with {wanted!r} in its name, but {', '.join(functions)}")
    for name in names:
        function, usage = functions[name], usages[name]
        print(f"{name}: {usage.registers} registers, {sass.spills(function)} spills", end="")
        print(f", {usage.stack} bytes of stack, {len(function.instructions)} instructions")
        control = flow.Flow(function)
        for loop in control.nested():
            head = function.instructions[loop.head].address
            own, indent = control.own(loop), "  " * (loop.depth + 1)
            listed = ", ".join(f"{n} {kind}" for kind, n in flow.kinds(own).most_common(10))
            print(f"{indent}{head:#06x} {flow.purpose(control.all(loop))}: {len(own)} of its own ({listed})")
            if control.innermost(loop):
                turn = control.turn(loop)
                each, rate = turn_cycles(turn, warps)
                print(
                    f"{indent}  {len(turn)} instructions and {each:.0f} cycles a turn of {warps} warps",
                    end="",
                )
                print(f", {rate:.2f} instructions a cycle")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="a file for all numbers")
    choices = objects.PRECISIONS
    parser.add_argument("--precision", nargs="+", choices=choices, default=list(choices))
    parser.add_argument("--backend", nargs="+", choices=(CUDA, TRITON), default=[CUDA])
    parser.add_argument("--kernel", nargs="+", default=[], help="parts of the steps' names, such as later")
    parser.add_argument("--check", action="store_true", help="fail if a limit of count_limits.py is broken")
    parser.add_argument("--cubin", type=Path)
    parser.add_argument("--function", default="", help="a part of the kernel's name, with --cubin")
    parser.add_argument("--warps", type=int, default=8, help="of a multiprocessor, with --cubin")
    args = parser.parse_args()
    if args.cubin:
        print_loops(args.cubin, args.function, args.warps)
        return
    if CUDA in args.backend and objects.nvcc() is None:
        raise SystemExit("gpu_counts needs nvcc: there is none on the path or in CUDA_HOME")
    rows = count_all(args.backend, args.precision, args.kernel)
    print(*table(rows), *kinds(rows), sep="\n")
    times: dict[str, float] = {}
    for backend, precision in product(args.backend, args.precision if not args.kernel else ()):
        forward, backward = (microseconds(rows, backend, op, precision) for op in (FORWARD, BACKWARD))
        name = f"{backend}, {precision}, forward"
        times |= {name: forward, f"{name} + backward": forward + backward}
    for name, value in times.items():
        print(f"{name}: {value:.0f} µs at {predictions.GIGAHERTZ} GHz")
    if args.json:
        args.json.write_text(json.dumps(record(rows, times), indent=1) + "\n")
    wrong = [
        line
        for row in rows
        if row.backend == CUDA
        for line in broken(row.precision, row.count, per_unit(row))
    ]
    for line in wrong:
        print(line)
    if args.check and wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
