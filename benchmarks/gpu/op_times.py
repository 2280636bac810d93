"""Times of every op on a GPU beside the reference and plain PyTorch, by graph replay and by calls.

A case that has a line in results.jsonl is not timed again: after a fault that leaves the process unable to
use the device, the same command continues with the next case.
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product

import torch

import capsops
from benchmarks.gpu.record import failure_recorded, record, recorded
from capsops.measuring import peers
from capsops.measuring.cases import Case, Form
from capsops.measuring.comparison import relative_error
from capsops.measuring.floor import floor_seconds, measured_ceilings
from capsops.measuring.gpu_memory import memory_of
from capsops.measuring.input_sets import call_each, input_sets
from capsops.measuring.passes import BOTH, FORWARD, FORWARD_BACKWARD, run
from capsops.measuring.precisions import matrix_precision
from capsops.measuring.timing import Race, clock, replay_seconds

SAMPLE_SECONDS, RACE_SECONDS = 2e-3, 0.2
HOPELESS = 6  # what takes so many times as long as the fastest is timed once by calls
FP32, TF32, BF16 = "float32", "float32, TF32 allowed", "bfloat16"
MNIST = (1152, 10, 16, 8)
OPS = ("capsule_routing", "dynamic_routing", "couplings", "predictions", "squash")


def in_modes(batch: int, sizes: tuple, modes: Sequence[str], op: str = OPS[0]) -> Iterator[tuple[Case, str]]:
    """Both directions of an op in each mode."""
    for precision, passes in product(modes, (FORWARD,) if op == "couplings" else BOTH):
        yield Case(batch, *sizes, precision=precision, op=op), passes


def cases() -> list[tuple[Case, str]]:
    """The headline first, then small batches, the other ops, other shapes, large batches."""

    def others(batch: int) -> Iterator[tuple[Case, str]]:
        for op in OPS[1:]:
            modes = (TF32, BF16, FP32) if op in ("couplings", "predictions") else (BF16, FP32)
            yield from in_modes(batch, MNIST, modes, op)

    return [
        *in_modes(128, MNIST, (TF32, BF16, FP32)),
        *in_modes(16, MNIST, (TF32, BF16, FP32)),
        *others(128),
        *in_modes(1, MNIST, (TF32, BF16)),
        *others(16),
        *in_modes(64, (288, 10, 52, 16), (TF32, BF16)),
        *in_modes(64, (288, 10, 17, 7), (TF32, BF16)),
        *in_modes(64, (128, 10, 32, 32), (TF32, BF16)),
        *in_modes(16, (3872, 196, 16, 8), (BF16, TF32)),
        *in_modes(1024, MNIST, (TF32, BF16, FP32)),
        *in_modes(256, (512, 8, 16, 16), (TF32, BF16)),
        *others(1024),
        *in_modes(512, MNIST, (TF32, BF16)),
    ]


def title(case: Case, passes: str) -> str:
    return f"{case.op} {case}, {passes}"


def forms(case: Case, impls: Sequence[str]) -> dict[str, Form]:
    """By name: ours, the reference, and plain PyTorch, eager, as in capsops/measuring/peers.py."""
    op, plain = getattr(capsops, case.op), peers.FORMS[case.op]
    return {impl: partial(op, impl=impl) for impl in (*impls, "reference")} | plain


def summary(seconds: Mapping[str, Sequence[float]], sets: int) -> dict[str, list[float]]:
    """Median, least and greatest seconds of one call of each."""
    return {name: [f(x) / sets for f in (statistics.median, min, max)] for name, x in seconds.items()}


def measure(
    case: Case, passes: str, impls: Sequence[str], device: torch.device, ceilings: Mapping[str, float]
) -> dict[str, object]:
    """Seconds by replay and by calls, differences from the reference, and memory of each form.

    A form that failed in part keeps what is known of it.
    """
    cuda, sets = device.type == "cuda", input_sets(case, device)
    calls, replays, differences, memory, failed = {}, {}, {}, {}, {}
    reference = case.bind(partial(getattr(capsops, case.op), impl="reference"))
    expected = run(reference, passes, *sets[0])
    for name, form in forms(case, impls).items():
        one = partial(run, case.bind(form), passes)
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
        times["floor"], times["unit"] = floor_seconds(case, passes, ceilings)
    return {**times, "differences": differences, "memory": memory, "sets": len(sets), "failures": failed}


def time_all(
    impls: Sequence[str], device: torch.device, seconds: float, chosen: Sequence[tuple[Case, str]]
) -> None:
    """A line for each case; one line names those that are not begun after `seconds`, or are cut short.

    A case that was begun before, by a process that a fault ended, is not begun again.
    """
    began = time.monotonic()
    if not recorded("ceilings"):
        record("ceilings", rates=measured_ceilings(device))
    ceilings = recorded("ceilings")[-1]["rates"]
    done = {row["case"] for row in recorded("times begun")}
    left = [one for one in chosen if title(*one) not in done]
    try:
        while left and time.monotonic() - began <= seconds:
            case, passes = left[0]
            labels = {"case": title(case, passes), "op": case.op, "batch": case.batch, "passes": passes}
            record("times begun", case=labels["case"])
            with failure_recorded("times", **labels), matrix_precision(case.precision == TF32):
                record("times", **labels, **measure(case, passes, impls, device, ceilings))
            left.pop(0)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # ends the process where the device is lost
                torch.cuda.empty_cache()
    finally:
        if left:
            record("not timed", cases=[title(*one) for one in left])


def headline_calls(impl: str, device: torch.device) -> None:
    """CapsNet's routing at B = 128, forward and backward, in each mode: to be run under Nsight Compute."""
    for precision in (TF32, BF16, FP32):
        case = Case(128, precision=precision)
        with matrix_precision(precision == TF32):
            run(partial(capsops.capsule_routing, impl=impl), FORWARD_BACKWARD, *case.inputs(device))
    torch.cuda.synchronize(device)


def warm_up(impls: Sequence[str], share: str, seconds: float) -> None:
    """Compiles what the cases need, into the caches on disk; share 1/4: every fourth case from the second."""
    began, device = time.monotonic(), torch.device("cuda")
    first, shares = map(int, share.split("/"))
    for case, passes in cases()[first::shares]:
        if time.monotonic() - began > seconds:
            break
        inputs = case.inputs(device)
        for impl in impls:
            labels = {"case": title(case, passes), "impl": impl}
            with failure_recorded("warm-up", **labels), matrix_precision(case.precision == TF32):
                run(case.bind(forms(case, impls)[impl]), passes, *inputs)
        torch.cuda.synchronize()
