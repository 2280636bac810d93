"""Times of every op on a GPU beside the reference and plain PyTorch, by graph replay and by calls.

A case that has a line in results.jsonl is not timed again: after a fault that leaves the process unable to
use the device, the same command continues with the next case.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

import capsops
from benchmarks import peers
from benchmarks.cases import Case, Form
from benchmarks.check import relative_error
from benchmarks.gpu.floor import floor_seconds, measured_ceilings
from benchmarks.gpu.record import failure_recorded, record, recorded
from benchmarks.passes import BOTH, FORWARD, FORWARD_BACKWARD, run
from benchmarks.precisions import PRECISIONS, matrix_precision
from benchmarks.timing import Race, clock, replay_seconds

SAMPLE_SECONDS, RACE_SECONDS = 2e-3, 0.2
HOPELESS = 6  # what takes so many times as long as the fastest is timed once by calls
COMPILED = ("einsum + sums", "matmul")  # the forms that gain by it
FP32, TF32, BF16 = "float32", "float32, TF32 allowed", "bfloat16"
MNIST = (1152, 10, 16, 8)
OPS = ("capsule_routing", "dynamic_routing", "couplings", "predictions", "squash")


@dataclass(frozen=True)
class TimedCase:
    """A case in one mode and direction; `compiles`: beside peers under torch.compile too."""

    case: Case
    passes: str
    precision: str = FP32
    compiles: bool = False

    def __str__(self) -> str:
        tf32 = " TF32" if self.precision == TF32 else ""
        return f"{self.case.op} {self.case}{tf32}, {self.passes}"

    def allowed(self) -> AbstractContextManager:
        """The context in which the case runs."""
        return matrix_precision(PRECISIONS[self.precision][1])


def timed_cases(
    batch: int, sizes: tuple, modes: Sequence[str], compiled: Sequence[str] = (), op: str = OPS[0]
) -> Iterator[TimedCase]:
    """Both directions of an op in each mode."""
    for mode, passes in product(modes, (FORWARD,) if op == "couplings" else BOTH):
        case = Case(batch, *sizes, dtype=mode.partition(",")[0], op=op)
        yield TimedCase(case, passes, mode, mode in compiled)


def cases() -> list[TimedCase]:
    """The headline first, then small batches, the other ops, other shapes, large batches."""

    def others(batch: int) -> Iterator[TimedCase]:
        for op in OPS[1:]:
            modes = (TF32, BF16, FP32) if op in ("couplings", "predictions") else (BF16, FP32)
            yield from timed_cases(batch, MNIST, modes, op=op)

    return [
        *timed_cases(128, MNIST, (TF32, BF16, FP32), (TF32, BF16)),
        *timed_cases(16, MNIST, (TF32, BF16, FP32)),
        *others(128),
        *timed_cases(1, MNIST, (TF32, BF16)),
        *others(16),
        *timed_cases(64, (288, 10, 52, 16), (TF32, BF16)),
        *timed_cases(64, (288, 10, 17, 7), (TF32, BF16)),
        *timed_cases(64, (128, 10, 32, 32), (TF32, BF16)),
        *timed_cases(16, (3872, 196, 16, 8), (BF16, TF32)),
        *timed_cases(1024, MNIST, (TF32, BF16, FP32)),
        *timed_cases(256, (512, 8, 16, 16), (TF32, BF16)),
        *others(1024),
        *timed_cases(512, MNIST, (TF32, BF16)),
    ]


def forms(timed: TimedCase, impls: Sequence[str]) -> dict[str, Form]:
    """By name: ours, the reference, and plain PyTorch as in benchmarks/peers.py."""
    op, plain = getattr(capsops, timed.case.op), peers.FORMS[timed.case.op]
    candidates = {impl: partial(op, impl=impl) for impl in (*impls, "reference")} | plain
    return candidates | (peers.with_compiled({x: plain[x] for x in COMPILED}) if timed.compiles else {})


def input_sets(case: Case, device: torch.device) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    """Copies of a case's inputs, so many that one round of them is twice the device's last-level cache."""
    inputs, grad = case.inputs(device)
    size = sum(x.nbytes for x in (*inputs, grad))
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    copies = min(max(-(-2 * cache // size), 2), 16)
    return [(tuple(x.detach().clone().requires_grad_() for x in inputs), grad.clone()) for _ in range(copies)]


def call_each(call: Callable[..., object], sets: Sequence[tuple]) -> None:
    """One call for each set of inputs."""
    for inputs, grad in sets:
        call(inputs, grad)


def memory_of(call: Callable[[], Sequence[Tensor]], device: torch.device) -> int:
    """Bytes at the peak of a call beyond those before it, less the gradients that it returns."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = call()
    return torch.cuda.max_memory_allocated(device) - before - sum(x.nbytes for x in results[1:])


def summary(seconds: Mapping[str, Sequence[float]], sets: int) -> dict[str, list[float]]:
    """Median, least and greatest seconds of one call of each."""
    return {name: [f(x) / sets for f in (statistics.median, min, max)] for name, x in seconds.items()}


def measure(
    timed: TimedCase, impls: Sequence[str], device: torch.device, ceilings: Mapping[str, float]
) -> dict[str, object]:
    """Seconds by replay and by calls, differences from the reference, and memory of each form.

    A form that failed in part keeps what is known of it.
    """
    case, cuda, sets = timed.case, device.type == "cuda", input_sets(timed.case, device)
    calls, replays, differences, memory, failed = {}, {}, {}, {}, {}
    reference = case.bind(partial(getattr(capsops, case.op), impl="reference"))
    expected = run(reference, timed.passes, *sets[0])
    for name, form in forms(timed, impls).items():
        one = partial(run, case.bind(form), timed.passes)
        try:
            results = one(*sets[0])
            differences[name] = max(relative_error(x, y) for x, y in zip(results, expected, strict=True))
            del results
            calls[name] = partial(call_each, one, sets)
            if cuda:
                memory[name] = memory_of(partial(one, *sets[0]), device)
                replays[name] = replay_seconds(calls[name])
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
            if cuda:
                torch.cuda.synchronize(device)  # raises where the device is lost
    race = Race(calls, partial(clock, device=device), SAMPLE_SECONDS, RACE_SECONDS)
    race.run(HOPELESS)
    times = {"calls": summary(race.seconds, len(sets)), "replay": summary(replays, len(sets))}
    if case.op == "capsule_routing":
        times["floor"], times["unit"] = floor_seconds(case, timed.passes, ceilings, timed.precision)
    return {**times, "differences": differences, "memory": memory, "sets": len(sets), "failures": failed}


def time_all(
    impls: Sequence[str], device: torch.device, seconds: float, chosen: Sequence[TimedCase] | None = None
) -> None:
    """A line for each case; one line names those that are not begun after `seconds`, or are cut short.

    A case that was begun before, by a process that a fault ended, is not begun again.
    """
    began = time.monotonic()
    if not recorded("ceilings"):
        record("ceilings", rates=measured_ceilings(device))
    ceilings = recorded("ceilings")[-1]["rates"]
    done = {row["case"] for row in recorded("times begun")}
    left = [timed for timed in (cases() if chosen is None else chosen) if str(timed) not in done]
    try:
        while left and time.monotonic() - began <= seconds:
            timed = left[0]
            labels = {"op": timed.case.op, "batch": timed.case.batch, "precision": timed.precision}
            labels = {"case": str(timed), **labels, "passes": timed.passes}
            record("times begun", case=str(timed))
            with failure_recorded("times", **labels), timed.allowed():
                record("times", **labels, **measure(timed, impls, device, ceilings))
            left.pop(0)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # ends the process where the device is lost
                torch.cuda.empty_cache()
    finally:
        if left:
            record("not timed", cases=[str(timed) for timed in left])


def headline_calls(impl: str, device: torch.device) -> None:
    """CapsNet's routing at B = 128, forward and backward, in each mode: to be run under Nsight Compute."""
    for timed in timed_cases(128, MNIST, (TF32, BF16, FP32)):
        if timed.passes == FORWARD_BACKWARD:
            with timed.allowed():
                form = timed.case.bind(forms(timed, [impl])[impl])
                run(form, timed.passes, *timed.case.inputs(device))
    torch.cuda.synchronize(device)


def warm_up(impls: Sequence[str], compiled: bool, share: str, seconds: float) -> None:
    """Compiles what the cases need, into the caches on disk; share 1/4: every fourth case from the second."""
    began, device = time.monotonic(), torch.device("cuda")
    first, shares = map(int, share.split("/"))
    chosen = [timed for timed in cases() if timed.compiles or not compiled]
    for timed in chosen[first::shares]:
        if time.monotonic() - began > seconds:
            break
        names = [f"{name}, compiled" for name in COMPILED] if compiled else impls
        inputs = timed.case.inputs(device)
        for name in names:
            with failure_recorded("warm-up", case=str(timed), impl=name), timed.allowed():
                run(timed.case.bind(forms(timed, impls)[name]), timed.passes, *inputs)
        torch.cuda.synchronize()
