"""Times of every op on a GPU beside the reference and plain PyTorch, by graph replay and by calls.

A case that has a line in results.jsonl is not timed again: after a fault that leaves the process unable to
use the device, the same command continues with the next case.
"""

import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import product

import torch
from torch import Tensor

import capsops
from benchmarks import peers
from benchmarks.cases import RoutingCase
from benchmarks.check import relative_error
from benchmarks.gpu.breakdown import kernel_seconds
from benchmarks.gpu.clock import captured, device_clock, in_turns, input_sets
from benchmarks.gpu.floor import Ceilings, floor_seconds, matrix_precision, measured_ceilings
from benchmarks.gpu.kernels import memory_of
from benchmarks.gpu.record import record, recorded
from benchmarks.passes import BOTH, FORWARD, FORWARD_BACKWARD, run

ROUNDS, SAMPLE_SECONDS = 11, 2e-3
# What takes HOPELESS times as long as the fastest is timed only by calls, in FEW_ROUNDS.
HOPELESS, FEW_ROUNDS = 6, 2
COMPILED = ("einsum + sums", "matmul")  # the forms that gain by it
TF32, BF16, FP32 = ("float32", True), ("bfloat16", False), ("float32", False)
LABELS = ("op", "batch", "dtype", "tf32", "passes")
OPS = ("capsule_routing", "dynamic_routing", "couplings", "predictions", "squash")


@dataclass(frozen=True)
class Case:
    """One op on one shape in one dtype."""

    op: str
    batch: int
    in_capsules: int
    out_capsules: int
    out_dim: int
    in_dim: int
    dtype: str
    tf32: bool
    passes: str
    compiles: bool = False

    @property
    def key(self) -> str:
        sizes = f"B={self.batch} {self.in_capsules}×{self.out_capsules}"
        if (self.out_dim, self.in_dim) != (16, 8):
            sizes += f" D={self.out_dim} K={self.in_dim}"
        return f"{self.op} {sizes} {'TF32' if self.tf32 else self.dtype}, {self.passes}"

    def inputs(self, device: str) -> tuple[tuple[Tensor, ...], Tensor]:
        """What the op takes, requiring gradients, and an upstream gradient; of lengths as in RoutingCase."""
        rng = torch.Generator(device).manual_seed(0)
        B, I, J, D, K = self.batch, self.in_capsules, self.out_capsules, self.out_dim, self.in_dim  # noqa: E741

        def numbers(*shape: int, scale: float = 1.0) -> Tensor:
            x = torch.randn(*shape, generator=rng, device=device) * scale
            return x.to(getattr(torch, self.dtype))

        u, out = partial(numbers, B, I, K, scale=0.3), partial(numbers, B, J, D)
        weight = partial(numbers, I, J, D, K, scale=0.1)
        if self.op == "squash":
            tensors, grad = (u(),), u()
        elif self.op == "dynamic_routing":
            tensors, grad = (numbers(B, I, J, D, scale=0.1),), out()
        else:
            tensors = u(), weight()
            grad = numbers(B, I, J, D) if self.op == "predictions" else out()
        return tuple(x.requires_grad_() for x in tensors), grad


def cases() -> list[Case]:
    """The headline first, then small batches, the other ops, other shapes, large batches."""
    mnist = (1152, 10, 16, 8)

    def routing(batch: int, sizes: tuple, modes: tuple, compiled: tuple = ()) -> Iterator[Case]:
        for mode, passes in product(modes, BOTH):
            yield Case("capsule_routing", batch, *sizes, *mode, passes, mode in compiled)

    def others(batch: int) -> Iterator[Case]:
        for op in OPS[1:]:
            modes = (TF32, BF16, FP32) if op in ("couplings", "predictions") else (BF16, FP32)
            for mode, passes in product(modes, (FORWARD,) if op == "couplings" else BOTH):
                yield Case(op, batch, *mnist, *mode, passes)

    return [
        *routing(128, mnist, (TF32, BF16, FP32), (TF32, BF16)),
        *routing(16, mnist, (TF32, BF16, FP32)),
        *others(128),
        *routing(1, mnist, (TF32, BF16)),
        *others(16),
        *routing(64, (288, 10, 52, 16), (TF32, BF16)),
        *routing(64, (288, 10, 17, 7), (TF32, BF16)),
        *routing(64, (128, 10, 32, 32), (TF32, BF16)),
        *routing(16, (3872, 196, 16, 8), (BF16, TF32)),
        *routing(1024, mnist, (TF32, BF16, FP32)),
        *routing(256, (512, 8, 16, 16), (TF32, BF16)),
        *others(1024),
        *routing(512, mnist, (TF32, BF16)),
    ]


def forms(case: Case, impls: list[str], compiled: bool) -> dict[str, Callable[..., Tensor]]:
    """By name: ours, the reference, and plain PyTorch as in benchmarks/peers.py."""
    op = getattr(capsops, case.op)
    candidates = {impl: partial(op, impl=impl) for impl in (*impls, "reference")}
    plain = {
        "capsule_routing": {n: partial(f, bias=None, iterations=3) for n, f in peers.ROUTING.items()},
        "dynamic_routing": {n: partial(f, bias=None, iterations=3) for n, f in peers.DYNAMIC_ROUTING.items()},
        "predictions": peers.PREDICTIONS,
        "squash": peers.SQUASH,
    }.get(case.op, {})
    candidates |= plain
    if compiled and case.compiles:
        torch.compiler.reset()
        for name in COMPILED:
            candidates[f"{name}, compiled"] = torch.compile(plain[name], dynamic=False)
    return candidates


def medians(
    calls: dict[str, Callable[[], object]], device: torch.device, sets: int, first: dict[str, float]
) -> dict[str, list[float]]:
    """Of each: median, least and greatest seconds of one call, the candidates in turns.

    `first` are the seconds that each took once.
    """
    clock, samples = device_clock(device), {name: [] for name in calls}
    repeats = {name: max(1, min(50, int(SAMPLE_SECONDS / max(first[name], 1e-6)) + 1)) for name in calls}
    for call in calls.values():
        clock(call, 1)
    for round_ in range(ROUNDS):
        for name, call in calls.items():
            if round_ < FEW_ROUNDS or first[name] <= HOPELESS * min(first.values()):
                samples[name].append(clock(call, repeats[name]) / repeats[name] / sets)
    return {name: [statistics.median(x), min(x), max(x)] for name, x in samples.items()}


def measure(case: Case, impls: list[str], device: torch.device, ceilings: Ceilings) -> dict[str, object]:
    """What is known of a case: seconds by replay and by calls, differences from the reference, memory.

    A form that failed in part keeps what is known of it.
    """
    cuda = device.type == "cuda"
    sets = input_sets(case, device)
    calls, replays, differences, memory, failed, first = {}, {}, {}, {}, {}, {}
    clock = device_clock(device)
    expected = run(partial(getattr(capsops, case.op), impl="reference"), case.passes, *sets[0])
    for name, form in forms(case, impls, compiled=cuda).items():
        one = partial(run, form, case.passes)
        try:
            results = one(*sets[0])
            differences[name] = max(relative_error(x, y) for x, y in zip(results, expected, strict=True))
            del results
            if cuda:
                memory[name] = memory_of(partial(one, *sets[0]), device)
            calls[name] = in_turns(one, sets)
            calls[name]()
            first[name] = clock(calls[name], 1)
            if cuda and first[name] <= HOPELESS * min(first.values()):
                replays[name] = captured(calls[name], device)
        except Exception as error:
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
            if cuda:
                torch.cuda.synchronize(device)  # raises where the device is lost
    known: dict[str, object] = {
        "calls": medians(calls, device, len(sets), first),
        "replay": medians(replays, device, len(sets), first),
        "differences": differences,
        "memory": memory,
        "sets": len(sets),
        "failures": failed,
    }
    if case.op == "capsule_routing":
        sizes = case.batch, case.in_capsules, case.out_capsules, case.out_dim, case.in_dim
        floor = floor_seconds(RoutingCase(*sizes, dtype=case.dtype), case.passes, ceilings, case.tf32)
        known["floor"], known["unit"] = floor
    return known


def known_ceilings(device: torch.device) -> Ceilings:
    """As measured in this run, else measured now."""
    rows = recorded("ceilings")
    if not rows:
        ceilings = measured_ceilings(device)
        record("ceilings", **asdict(ceilings))
        return ceilings
    return Ceilings(**{field.name: rows[-1][field.name] for field in fields(Ceilings)})


def time_all(
    impls: list[str], device: torch.device, seconds: float, chosen: list[Case] | None = None
) -> None:
    """A line for each case; one line names those that are not begun after `seconds`, or are cut short.

    A case that was begun before, by a process that a fault ended, is not begun again.
    """
    began, ceilings = time.monotonic(), known_ceilings(device)
    done = {row["case"] for row in recorded("times", "times begun")}
    left = [case for case in (cases() if chosen is None else chosen) if case.key not in done]
    try:
        while left and time.monotonic() - began <= seconds:
            case = left[0]
            labels = {"case": case.key, **{name: getattr(case, name) for name in LABELS}}
            record("times begun", case=case.key)
            try:
                with matrix_precision(case.tf32):
                    record("times", **labels, **measure(case, impls, device, ceilings))
            except Exception as error:
                traceback.print_exc()
                record("times", **labels, failed=f"{type(error).__name__}: {str(error)[:400]}")
                if device.type == "cuda":
                    torch.cuda.synchronize(device)  # ends the process where the device is lost
            left.pop(0)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    finally:
        if left:
            record("not timed", cases=[case.key for case in left])


def time_kernels(impls: list[str], device: torch.device) -> None:
    """Seconds of each kernel of a headline call, forward and backward, by the profiler."""
    for impl, mode in product(impls, (TF32, BF16, FP32)):
        case = Case("capsule_routing", 128, 1152, 10, 16, 8, *mode, FORWARD_BACKWARD)
        try:
            with matrix_precision(case.tf32):
                call = partial(run, forms(case, [impl], False)[impl], case.passes, *case.inputs(str(device)))
                record("kernels", impl=impl, case=case.key, seconds=kernel_seconds(call, device))
        except Exception as error:
            traceback.print_exc()
            record("kernels", impl=impl, case=case.key, failed=f"{type(error).__name__}: {str(error)[:300]}")


def warm_up(impls: list[str], compiled: bool, share: int, shares: int, seconds: float) -> None:
    """Compiles what the cases need, into the caches on disk; of the cases every `shares`-th from `share`."""
    began, device = time.monotonic(), torch.device("cuda")
    chosen = [case for case in cases() if not compiled or case.compiles]
    for case in chosen[share::shares]:
        if time.monotonic() - began > seconds:
            break
        names = [f"{name}, compiled" for name in COMPILED] if compiled else impls
        with matrix_precision(case.tf32):
            inputs = case.inputs(str(device))
            for name, form in forms(case, impls, compiled).items():
                if name in names:
                    try:
                        run(form, case.passes, *inputs)
                    except Exception as error:
                        traceback.print_exc()
                        record(
                            "warm up",
                            case=case.key,
                            impl=name,
                            failed=f"{type(error).__name__}: {str(error)[:300]}",
                        )
        torch.cuda.synchronize()
