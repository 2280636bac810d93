"""Interleaved timing: the candidates take turns, so that what disturbs the machine disturbs all of them."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping

import torch

FEWEST_ROUNDS, MOST_ROUNDS = 7, 31
CPU = torch.device("cpu")

Call = Callable[[], object]


def clock(call: Call, calls: int, device: torch.device = CPU) -> float:
    """Seconds that `calls` calls take together, until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def cpu_clock(call: Call, calls: int) -> float:
    """Seconds of CPU time that `calls` calls take together, on all threads."""
    begin = time.process_time()
    for _ in range(calls):
        call()
    return time.process_time() - begin


def fastest(call: Call, device: torch.device = CPU) -> float:
    """Seconds of one call, the best of a few samples."""
    clock(call, 3, device)
    return min(clock(call, 5, device) / 5 for _ in range(3))


def replay_seconds(call: Call) -> list[float]:
    """Samples of the seconds that a call takes in a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    torch.cuda.synchronize()
    return [milliseconds / 1e3 for milliseconds in do_bench_cudagraph(call, rep=5, return_mode="all")]


def spread(samples: Iterable[float]) -> float:
    """Half the distance between the quartiles, over the median."""
    low, middle, high = statistics.quantiles(samples, n=4)
    return (high - low) / 2 / middle


class Race:
    """Candidates by name, timed alternately. Each lap takes one sample of each: the calls that fill `sample`.

    Args:
        candidates: what to call.
        clock: takes a call and how often to make it, returns seconds.
        sample: seconds of one sample, at least.
        length: seconds of the whole race, within the bounds on its rounds.
        fewest: rounds, at least.
    """

    def __init__(
        self,
        candidates: Mapping[str, Call],
        clock: Callable[[Call, int], float] = clock,
        sample: float = 0.02,
        length: float = 5,
        fewest: int = FEWEST_ROUNDS,
    ) -> None:
        self.candidates = dict(candidates)
        self.clock, self.sample, self.length, self.fewest = clock, sample, length, fewest
        self.calls: dict[str, int] = {}
        self.seconds: dict[str, list[float]] = {name: [] for name in candidates}

    def warm_up(self, hopeless: float = math.inf) -> None:
        """Calls each until it is compiled and its threads run, and chooses how many calls make a sample.

        Candidates other than "ours" that take `hopeless` times as long as the fastest of them stop here.
        """
        first: dict[str, float] = {}
        for name, call in self.candidates.items():
            once, calls = self.clock(call, 1), 1
            seconds = once if once > 1 else self.clock(call, 1)  # slow calls need no second look
            while seconds < self.sample:
                calls = max(2 * calls, int(1.1 * calls * self.sample / max(seconds, self.sample / 100)))
                seconds = self.clock(call, calls)
            self.calls[name], first[name] = calls, min(once, seconds / calls)
        least = min((seconds for name, seconds in first.items() if name != "ours"), default=0.0)
        for name, seconds in first.items():
            if name != "ours" and seconds > hopeless * least:
                del self.candidates[name]
                self.seconds[name].append(seconds)
        lap = sum(first[name] * self.calls[name] for name in self.candidates)
        self.rounds = min(max(int(self.length / lap), self.fewest), MOST_ROUNDS)

    def lap(self, names: Iterable[str]) -> None:
        """One sample of each of these."""
        for name in names:
            self.seconds[name].append(self.clock(self.candidates[name], self.calls[name]) / self.calls[name])

    def run(self, hopeless: float = math.inf) -> dict[str, float]:
        """The whole race; the medians."""
        self.warm_up(hopeless)
        for _ in range(self.rounds):
            self.lap(self.candidates)
        return self.medians()

    def medians(self) -> dict[str, float]:
        """Seconds of one call of each."""
        return {name: statistics.median(seconds) for name, seconds in self.seconds.items()}
