"""Routing kernels on a GPU: right first, then timed against plain PyTorch, by graph replay and by calls.

python -m benchmarks.gpu.kernels --impl triton [--plan] [--out DIR] [--seconds N] [--stages STAGE ...]

In this order: the equivalence of every op (benchmarks.gpu.equivalence) with compute-sanitizer on small shapes
beside it, the device's ceilings, then the cases below, those with targets first. What did not fit into the
seconds, and what failed, is listed and makes the command fail. Writes kernels-IMPL-DEVICE.json after every
case.

Ours and the peers take turns. A sample is one round of several sets of inputs, together twice the size of
the last-level cache. `seconds` is of graph replay, `details` holds plain calls; a peer that cannot be
captured takes part by its calls, and its name says so.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import capsops
from benchmarks import machine, peers
from benchmarks.cases import Routing, RoutingCase, bound
from benchmarks.check import relative_error
from benchmarks.gpu import equivalence, sanitizer
from benchmarks.gpu.breakdown import breakdown, kernel_seconds
from benchmarks.gpu.clock import captured, device_clock, in_turns, input_sets
from benchmarks.gpu.device import describe_device
from benchmarks.gpu.floor import Ceilings, floor_seconds, matrix_precision, measured_ceilings
from benchmarks.operations import routing_operations
from benchmarks.passes import BOTH, FORWARD, FORWARD_BACKWARD, run
from benchmarks.report import plain_table
from benchmarks.rows import Row, Target, save
from benchmarks.timing import FEWEST_ROUNDS, Race

SUITE = "routing on a GPU"
COMPILED = ("einsum + sums", "matmul")  # the forms that gain by it
MODE = "max-autotune-no-cudagraphs"
WORKERS = 12  # processes that compare, and compile kernels meanwhile
RACE_SECONDS = 1.5
STAGES = ("equivalence", "sanitizer", "timings")
HOPELESS = 6.0
SHAPES = {"1152×10": (1152, 10), "2048×10": (2048, 10), "3872×196": (3872, 196)}


@dataclass(frozen=True)
class Goal:
    """What a case is to reach: times eager, times compiled, share of the floor; 0: no target."""

    eager: float = 0
    compiled: float = 0
    share: float = 0


@dataclass(frozen=True)
class Task:
    """One case to be timed."""

    case: RoutingCase
    passes: str
    tf32: bool
    goal: Goal = Goal()
    compiles: bool = False

    def __str__(self) -> str:
        return f"{self.case}{' TF32' if self.tf32 else ''}, {self.passes}"


GOALS = {
    "triton": {
        (128, FORWARD): Goal(15, 5),
        (128, FORWARD_BACKWARD): Goal(8, 4),
        (512, FORWARD_BACKWARD): Goal(8, 4, 0.4),
    },
    "cuda": {
        (128, FORWARD): Goal(20, 8),
        (128, FORWARD_BACKWARD): Goal(12, 6),
        (1024, FORWARD_BACKWARD): Goal(share=0.5),
    },
}
LEANER = 25  # times less memory than einsum, beyond inputs and gradients


def tasks(impl: str, batches: Sequence[int] = (128, 512, 16)) -> list[Task]:
    """The cases with targets, then the others: modes before shapes, the largest last."""
    goals = GOALS.get(impl, {})
    found = [
        Task(RoutingCase(B), passes, True, goal, bool(goal.compiled)) for (B, passes), goal in goals.items()
    ]
    for shape in SHAPES.values():
        for dtype, tf32 in (("bfloat16", False), ("float32", True), ("float32", False)):
            for B in batches:
                if shape == SHAPES["3872×196"] and B > 128:
                    continue  # û alone would take 25 GB
                for passes in BOTH:
                    task = Task(RoutingCase(B, *shape, dtype=dtype), passes, tf32)
                    if not any((t.case, t.passes, t.tf32) == (task.case, passes, tf32) for t in found):
                        found.append(task)
    return found


def routing_of(impl: str) -> Routing:
    """capsops' fused routing by one implementation."""

    def route(u: Tensor, weight: Tensor, bias: Tensor | None, iterations: int) -> Tensor:
        return capsops.capsule_routing(u, weight, bias, iterations=iterations, impl=impl)

    return route


def candidates(task: Task, impl: str, others: Sequence[str]) -> dict[str, Routing]:
    """Ours, other implementations of capsops, and the peers."""
    found = {impl: routing_of(impl)} | {name: routing_of(name) for name in others} | peers.ROUTING
    if task.compiles:
        forms = peers.with_compiled({name: peers.ROUTING[name] for name in COMPILED}, MODE)
        found |= {name: form for name, form in forms.items() if name not in peers.ROUTING}
    return found


def memory_of(call: Callable[[], object], device: torch.device) -> int:
    """Bytes at the peak of a call beyond what is there before it, less what it returns."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return peak - sum(x.nbytes for x in results[1:])  # v counts, gradients do not


def measure(
    task: Task, impl: str, others: Sequence[str], ceilings: Ceilings, device: torch.device
) -> tuple[Row, list[str]]:
    """The row of one case, and what failed in it."""
    case, passes, failures = task.case, task.passes, []
    sets, clock, cuda = input_sets(case, device), device_clock(device), device.type == "cuda"
    calls, replays, memory = {}, {}, {}
    expected: tuple[Tensor, ...] | None = None
    error = 0.0
    for name, routing in candidates(task, impl, others).items():
        one = partial(run, bound(routing, case), passes)
        try:
            found = one(*sets[0])
            if expected is None:  # ours, which was compared with float64 before anything was timed
                expected = found
            differing = max(relative_error(x, y) for x, y in zip(found, expected, strict=True))
            if not differing <= (3e-2 if case.dtype != "float32" else 2e-2 if task.tf32 else 1e-3):
                raise AssertionError(f"differs from ours by {differing:.2e} of the norm")
            error = max(error, differing)
            if cuda and "compiled" not in name:
                memory[name] = memory_of(partial(one, *sets[0]), device)
            calls[name] = in_turns(one, sets)
        except Exception as problem:
            failures.append(f"{task}, {name}: {type(problem).__name__}: {str(problem)[:300]}")
            torch.cuda.empty_cache()
            continue
        finally:
            found = None
        try:
            replays[name] = captured(calls[name], device) if cuda else calls[name]
        except Exception as problem:
            failures.append(f"{task}, {name}, capture: {type(problem).__name__}: {str(problem)[:300]}")
    if impl not in calls or impl not in replays:
        raise RuntimeError(f"{task}: no result of {impl}: {'; '.join(failures)}")
    timed = {name: replays.get(name, call) for name, call in calls.items()}
    wanted = any(vars(task.goal).values())
    by_replay, by_calls = (medians(turns, impl, clock, len(sets), wanted) for turns in (timed, calls))
    named = {name if name in replays else f"{name}, not captured": s for name, s in by_replay.items()}
    rivals = {name: s for name, s in named.items() if name not in (impl, *others)}
    least, unit = floor_seconds(case, passes, ceilings, task.tf32)
    share = least / named[impl]
    row = Row(
        suite=SUITE,
        op="capsule_routing",
        case=f"{case}{' TF32' if task.tf32 else ''}",
        passes=passes,
        dtype=case.dtype,
        impl=impl,
        seconds=named[impl],
        peers=rivals,
        details={f"{name}, calls": s for name, s in by_calls.items()}
        | {f"{name}, replay": named[name] for name in others if name in named}
        | {f"floor: {unit}": least},
        error=error,
        operations=routing_operations(case, passes),
        share=share,
        memory=memory.get(impl),
        peers_memory={name: size for name, size in memory.items() if name in peers.ROUTING},
    )
    row.targets = targets(task, row, rivals)
    row.targets += [Target(name, 1, named[name] / named[impl]) for name in others if name in named]
    if cuda and wanted:
        one = partial(run, bound(routing_of(impl), case), passes, *sets[0])
        row.details |= parts(str(task), partial(breakdown, one, case, ceilings, task.tf32, device), failures)
    return row, failures


def medians(
    calls: dict[str, Callable[[], object]], ours: str, clock: Callable, sets: int, long: bool = True
) -> dict[str, float]:
    """Seconds of one call of each, in as few rounds as give a median unless it is to be a `long` race."""
    race = Race(calls, clock, seconds=RACE_SECONDS)
    race.warm_up()
    race.drop([name for name in calls if name != ours], HOPELESS)
    for _ in range(race.rounds() if long else FEWEST_ROUNDS):
        race.lap(race.candidates)
    return {name: seconds / sets for name, seconds in race.medians().items()}


def targets(task: Task, row: Row, rivals: dict[str, float]) -> list[Target]:
    """Those of the task, as far as it has rivals."""
    found = []
    for what, wanted, names in (
        ("eager", task.goal.eager, [name for name in rivals if "compiled" not in name]),
        ("compiled", task.goal.compiled, [name for name in rivals if "compiled" in name]),
    ):
        if wanted and names:
            found.append(Target(what, wanted, min(rivals[name] for name in names) / row.seconds))
    if task.goal.share:
        found.append(Target("share", task.goal.share, row.share))
    if task.goal.eager and row.memory is not None and "einsum" in row.peers_memory:
        found.append(Target("memory ratio", LEANER, row.peers_memory["einsum"] / max(row.memory, 1)))
    return found


def parts(name: str, measured: Callable[[], dict[str, float]], failures: list[str]) -> dict[str, float]:
    """Seconds by kernel; where the profiler does not work, nothing but a failure that says why."""
    try:
        return measured()
    except Exception as problem:
        failures.append(f"{name}, by kernel: {type(problem).__name__}: {str(problem)[:300]}")
        return {}


def given_u_hat(impl: str, passes: str, ceilings: Ceilings, device: torch.device, failures: list[str]) -> Row:
    """dynamic_routing of a given û, B = 128 in bf16: the time of one read of û over its own.

    Backward it is that of two reads, which the forward direction's and its own may not need, and one writing.
    """
    u_hat = [(torch.randn(128, 1152, 10, 16, device=device) * 0.2).bfloat16() for _ in range(3)]
    grad = torch.randn(128, 10, 16, device=device).bfloat16()
    route = partial(capsops.dynamic_routing, impl=impl)

    def together() -> None:
        for x in u_hat:
            run(route, passes, (x.requires_grad_(),), grad)

    together()
    seconds = medians({impl: captured(together, device)}, impl, device_clock(device), len(u_hat))[impl]
    moved = (1 if passes == FORWARD else 3) * u_hat[0].nbytes
    share = moved / ceilings.bandwidth / seconds
    wanted = [Target("share", 0.6, share)] if impl == "cuda" and passes == FORWARD else []
    one = partial(run, route, passes, (u_hat[0],), grad)
    seconds_of = parts("a given û", partial(kernel_seconds, one, device), failures)
    details = {f"kernel {name}": x for name, x in seconds_of.items()}
    return Row(
        SUITE, "dynamic_routing", "B=128 1152×10 bfloat16, û given", passes, "bfloat16", impl, seconds,
        share=share, targets=wanted, details=details,
    )  # fmt: skip


def plan(impl: str, others: Sequence[str], seconds: float) -> str:
    """What a run does, in words."""
    lines = [
        f"equivalence: every op of {impl}, {len(equivalence.FULL)} shapes × {len(equivalence.OPTIONS)} sets "
        "of options × float32, float32 with TF32, bfloat16, float16; twice each, equal bit for bit; in "
        f"{WORKERS} processes, {seconds / 4:.0f} s at most",
        f"compute-sanitizer meanwhile: {', '.join(sanitizer.tools(impl))} on {len(equivalence.SMALL)} shapes",
        "ceilings: copy, matrix products in bf16, TF32 and float32",
        "of cases with targets, the seconds of each kernel beside the floor of its part",
        f"then, until {seconds:.0f} s are over, graph replay and plain calls of {', '.join([impl, *others])} "
        f"and {', '.join(peers.ROUTING)}, where said also compiled with mode={MODE}:",
    ]
    for task in tasks(impl):
        goal = {name: value for name, value in asdict(task.goal).items() if value}
        lines.append(
            f"  {task}{', compiled too' if task.compiles else ''}{f', targets {goal}' if goal else ''}"
        )
    return "\n".join([*lines, "  dynamic_routing of a given û, B=128, bfloat16"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--impl", required=True, choices=("triton", "cuda", "cpu"))
    parser.add_argument(
        "--beside", nargs="*", default=[], help="other implementations, timed in the same run"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=430, help="no case begins after so many")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--plan", action="store_true", help="print what would be done; needs no GPU")
    args = parser.parse_args()
    if args.plan:
        print(plan(args.impl, args.beside, args.seconds))
        return
    began, device = time.monotonic(), torch.device(args.device)
    small = device.type == "cpu"
    outcome = equivalence.Outcome()
    sanitizing = sanitizer.start(args.impl, args.out) if "sanitizer" in args.stages and not small else []
    if "equivalence" in args.stages:
        shapes = equivalence.SMALL[:1] if small else equivalence.FULL
        outcome = equivalence.compare_all(
            args.impl, device, shapes, args.seconds / 4, 0 if small else WORKERS
        )
        print(
            f"{outcome.compared} compared, {len(outcome.failures)} failed, worst {outcome.worst}", flush=True
        )
    failures = outcome.failures + outcome.late
    if "sanitizer" in args.stages and not small:
        failures += sanitizer.collect(args.impl, sanitizing)
    ceilings = measured_ceilings(device)
    header = {
        **machine.provenance(["python", "-m", "benchmarks.gpu.kernels", *sys.argv[1:]]),
        "device": describe_device(device),
        "ceiling": {"flops": ceilings.tf32, "how": "torch.mm of float32 with TF32", **asdict(ceilings)},
        "equivalence": {
            "compared": outcome.compared,
            "failed": len(outcome.failures),
            "worst": outcome.worst,
        },
    }
    rows: list[Row] = []
    path = args.out / f"kernels-{args.impl}-{machine.slug(header['device']['model'])}.json"

    def keep(row: Row) -> None:
        rows.append(row)
        save(path, {**header, "failures": failures}, rows)
        print(*plain_table([row])[2:], sep="\n", flush=True)

    chosen = tasks(args.impl) if "timings" in args.stages else []
    if small:
        chosen = [Task(RoutingCase(2, 9, 3, 4, 8), passes, False) for passes in BOTH]
    for task in chosen:
        if time.monotonic() - began > args.seconds:
            failures.append(f"{task}: not begun, {args.seconds:.0f} s were over")
            continue
        try:
            with matrix_precision(task.tf32):
                row, failed = measure(task, args.impl, args.beside, ceilings, device)
            failures += failed
            keep(row)
        except Exception as error:
            failures.append(f"{task}: {type(error).__name__}: {str(error)[:400]}")
    for passes in BOTH if chosen and not small else ():
        try:
            keep(given_u_hat(args.impl, passes, ceilings, device, failures))
        except Exception as error:
            failures.append(
                f"dynamic_routing of a given û, {passes}: {type(error).__name__}: {str(error)[:400]}"
            )
    save(path, {**header, "failures": failures}, rows)
    print("", *plain_table(rows), "", f"written to {path}", sep="\n")
    if failures:
        sys.exit("\n".join(["failed or not done:", *failures]))


if __name__ == "__main__":
    main()
