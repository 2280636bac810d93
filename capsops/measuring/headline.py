"""One case of `python -m capsops bench`: ours beside plain PyTorch, compared first, then timed in turns."""

import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

import capsops
from capsops import dispatch
from capsops.measuring import peers
from capsops.measuring.cases import Case, Form, exact, plain
from capsops.measuring.comparison import check
from capsops.measuring.floor import floor_seconds
from capsops.measuring.gpu_memory import memory_of
from capsops.measuring.input_sets import call_each, input_sets
from capsops.measuring.operations import operations
from capsops.measuring.passes import FORWARD, FORWARD_BACKWARD, run
from capsops.measuring.timing import Race, clock, replay_seconds

OURS, COMPILED = "ours", ", compiled"
TF32, BF16 = "float32, TF32 allowed", "bfloat16"
CALLS, REPLAY = "calls", "graph replay"
COMPILED_ON = {"cpu": ("einsum + sums", "einsum"), "cuda": ("einsum + sums", "matmul")}  # the fastest first
SLOW = 2  # on a CPU, an eager form whose first call takes so many times as long as the fastest's is left out
HOPELESS = 3  # what takes so many times as long as the fastest is timed once, by calls
RACES = {"cpu": (0.02, 2.0, 5), "cuda": (0.002, 0.2, 7)}  # seconds of a sample, and of all; rounds at least
CASE_SECONDS = 3  # of timing a case, about
# As many roundings of float32, one for each term of a sum, as amount to two of TF32, which are 2⁻¹⁰.
TF32_TERMS = 2**28

Call = Callable[..., tuple[Tensor, ...]]


class WrongResultError(Exception):
    """Ours is not as exact as its dtype allows."""


@dataclass(frozen=True)
class Row:
    """One case timed in one way: seconds of one call of ours, and of each form of plain PyTorch."""

    batch: int
    passes: str
    precision: str
    timed_by: str  # CALLS, REPLAY
    impl: str  # the backend that ours is
    ours: float
    eager: dict[str, float]
    compiled: dict[str, float]
    share: float  # of what the measured ceilings allow
    limit: str  # the one that limits
    error: float  # of ours, relative, against float64
    memory: dict[str, int]  # bytes beyond the inputs, on a GPU

    @property
    def ratio(self) -> float | None:
        """How many times as long the fastest form of plain PyTorch takes."""
        others = [*self.eager.values(), *self.compiled.values()]
        return min(others) / self.ours if others else None

    def as_json(self) -> dict[str, object]:
        """With what follows from the rest."""
        forms = {"eager_form": fastest(self.eager), "compiled_form": fastest(self.compiled)}
        return {**asdict(self), **forms, "ratio": self.ratio}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Row":
        return cls(**{field.name: values[field.name] for field in fields(cls)})


def fastest(seconds: Mapping[str, float]) -> str | None:
    """The name of the fastest."""
    return min(seconds, key=seconds.__getitem__) if seconds else None


class Budget:
    """Decides what is begun, so that the whole ends in time.

    A form is compiled if the time left is enough for that, for timing the cases to come, and where it is not
    the first form of its case, for one form in each of them. Compiling counts as long as the longest so far.
    """

    def __init__(self, seconds: float, cases: int, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.end = now, now() + seconds
        self.cases = cases  # that are not measured yet, with the present one
        self.compilation = 0.0  # seconds of the longest

    def over(self) -> bool:
        return self.now() > self.end

    def compiles(self, first: bool) -> bool:
        """Whether one more form is compiled for the present case."""
        forms = 1 if first else self.cases
        return self.now() + self.cases * CASE_SECONDS + forms * self.compilation <= self.end


@dataclass
class Bench:
    """What a run of the benchmark knows and collects."""

    device: torch.device
    backend: str  # "auto" or a name
    compiles: bool
    replays: bool
    ceilings: Mapping[str, float]  # of measured_ceilings, on a CPU its float32 only
    budget: Budget
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)  # forms that do not compile here
    slow: set[tuple[Case, str]] = field(default_factory=set)  # eager forms that are left out

    left_out: dict[str, list[str]] = field(default_factory=dict)  # what there was no time for, in which cases

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def leave_out(self, what: str, title: str) -> None:
        self.left_out.setdefault(what, []).append(title)

    def all_notes(self, cases: int) -> list[str]:
        """With one about each thing that there was no time for, in which of all `cases`."""
        missing = [
            f"no time for {what}{': ' + '; '.join(titles) if len(titles) < cases else ''}"
            for what, titles in self.left_out.items()
        ]
        return [*self.notes, *missing]


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def why(error: Exception) -> str:
    """A failure on one line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(f"{type(error).__name__}: {lines[0] if lines else ''}", 300)


def backend_of(case: Case, backend: str, device: torch.device) -> str:
    """The name of the backend that computes a case."""
    shapes = case.shapes_of_layer
    return dispatch.chosen(case.op, dispatch.asked(backend), device, case.dtype, shapes).name


class Candidates:
    """What is timed in one case: ours and forms of plain PyTorch, each compared with the reference before."""

    def __init__(self, bench: Bench, case: Case, passes: str) -> None:
        self.bench, self.case, self.passes = bench, case, passes
        self.title, self.forms = f"{case}, {passes}", peers.FORMS[case.op]
        cuda = bench.device.type == "cuda"
        self.sets = input_sets(case, bench.device) if cuda else [case.inputs()]
        results = slice(1 if passes == FORWARD else None)
        self.plain = plain(case, FORWARD_BACKWARD, bench.device)[results]
        self.exact = exact(case, FORWARD_BACKWARD, bench.device)[results]
        self.terms = max(case.terms, TF32_TERMS) if case.precision == TF32 else case.terms
        self.calls: dict[str, Call] = {}

    def admit(self, name: str, form: Form) -> float:
        """The error of a form, which is timed from now on; AssertionError where it is wrong."""
        call = partial(run, self.case.bind(form), self.passes)
        results = call(*self.sets[0])
        error = check(f"{name}, {self.title}", results, self.plain, self.exact, self.terms)
        self.calls[name] = call
        return error

    def admit_ours(self) -> float:
        """The error of ours."""
        try:
            return self.admit(OURS, partial(getattr(capsops, self.case.op), impl=self.bench.backend))
        except AssertionError as wrong:
            raise WrongResultError(str(wrong)) from wrong

    def admit_eager(self) -> None:
        """All forms that work, on a CPU without the slow ones."""
        seconds: dict[str, float] = {}
        for name, form in self.forms.items():
            if (self.case, name) in self.bench.slow:
                continue
            start = time.monotonic()
            try:
                self.admit(name, form)
                seconds[name] = time.monotonic() - start
            except Exception as failure:
                self.bench.note(f"{name}, {self.title}: not timed: {why(failure)}")
        if self.bench.device.type == "cpu":
            for name in [x for x in seconds if seconds[x] > SLOW * min(seconds.values())]:
                del self.calls[name]
                self.bench.slow.add((self.case, name))

    def admit_compiled(self) -> None:
        """Forms under torch.compile, as many as there is time for."""
        torch.compiler.reset()  # drops code that was compiled for another case
        first, budget = True, self.bench.budget
        for name in COMPILED_ON[self.bench.device.type]:
            if name in self.bench.failed:
                continue
            if not budget.compiles(first):
                self.bench.leave_out(f"torch.compile of {name}", self.title)
                continue
            progress(f"  compiling {name}")
            start = time.monotonic()
            try:
                form = torch.compile(self.forms[name], dynamic=False, fullgraph=True)
                self.admit(name + COMPILED, form)
                first = False
            except Exception as failure:
                self.bench.failed.add(name)
                self.bench.note(f"torch.compile: {name} is not timed: {why(failure)}")
            budget.compilation = max(budget.compilation, time.monotonic() - start)


def measure(bench: Bench, case: Case, passes: str) -> None:
    """Adds the rows of a case; WrongResultError where ours is wrong.

    A form of plain PyTorch that is wrong or fails is left out, with a note.
    """
    progress(f"{case}, {passes}")
    candidates = Candidates(bench, case, passes)
    error = candidates.admit_ours()
    candidates.admit_eager()
    if bench.compiles:
        candidates.admit_compiled()
    progress("  timing")
    calls, sets, memory = candidates.calls, candidates.sets, {}
    if bench.device.type == "cuda":
        memory = {name: memory_of(partial(call, *sets[0]), bench.device) for name, call in calls.items()}
    for timed_by, times in take_times(bench, calls, sets).items():
        share, limit = share_of_ceiling(bench, case, passes, times[OURS])
        row = Row(
            batch=case.batch,
            passes=passes,
            precision=case.precision,
            timed_by=timed_by,
            impl=backend_of(case, bench.backend, bench.device),
            ours=times.pop(OURS),
            eager={name: x for name, x in times.items() if not name.endswith(COMPILED)},
            compiled={name[: -len(COMPILED)]: x for name, x in times.items() if name.endswith(COMPILED)},
            share=share,
            limit=limit,
            error=error,
            memory=memory,
        )
        bench.rows.append(row)


def take_times(bench: Bench, calls: Mapping[str, Call], sets: Sequence[tuple]) -> dict[str, dict[str, float]]:
    """Seconds of one call of each, by graph replay where that is possible, and by calls."""
    rounds = {name: partial(call_each, call, sets) for name, call in calls.items()}
    replays = {}
    for name, call in rounds.items() if bench.replays else ():
        try:
            replays[name] = statistics.median(replay_seconds(call))
        except Exception as failure:
            bench.note(f"no graph replay of {name}: {why(failure)}")
    race = Race(rounds, partial(clock, device=bench.device), *RACES[bench.device.type])
    ways = {REPLAY: replays, CALLS: race.run(HOPELESS)}
    return {
        way: {name: x / len(sets) for name, x in seconds.items()}
        for way, seconds in ways.items()
        if OURS in seconds
    }


def share_of_ceiling(bench: Bench, case: Case, passes: str, seconds: float) -> tuple[float, str]:
    """What a call attains of what the device allows at best, and the ceiling that limits it."""
    if bench.device.type == "cuda":
        least, limit = floor_seconds(case, passes, bench.ceilings)
        return least / seconds, limit
    return operations(case, passes).flops / seconds / bench.ceilings["float32"], "float32"
