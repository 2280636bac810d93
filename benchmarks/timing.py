"""Interleaved timing: the candidates take turns, so that what disturbs the machine disturbs all of them."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping

FEWEST_ROUNDS, MOST_ROUNDS = 7, 31
RACE_SECONDS = 5
SAMPLE_SECONDS = 0.02

Call = Callable[[], object]
Clock = Callable[[Call, int], float]


def wall_clock(call: Call, calls: int) -> float:
    """Seconds that `calls` calls take together."""
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - begin


class Race:
    """Candidates by name, timed alternately. Each lap takes one sample of each: the calls that fill `sample`.

    Another device brings its own `clock`.
    """

    def __init__(
        self,
        candidates: Mapping[str, Call],
        clock: Clock = wall_clock,
        sample: float = SAMPLE_SECONDS,
        seconds: float | None = None,
    ) -> None:
        self.candidates = dict(candidates)
        self.clock = clock
        self.sample = sample
        self.race_seconds = RACE_SECONDS if seconds is None else seconds
        self.calls: dict[str, int] = {}
        self.first: dict[str, float] = {}
        self.seconds: dict[str, list[float]] = {name: [] for name in candidates}

    def warm_up(self) -> None:
        """Calls each until it is compiled and its threads run, then settles the calls in a sample."""
        for name, call in self.candidates.items():
            first = self.clock(call, 1)
            calls = 1
            while (seconds := self.clock(call, calls)) < self.sample:
                calls = max(2 * calls, int(1.1 * calls * self.sample / max(seconds, self.sample / 100)))
            self.calls[name] = calls
            self.first[name] = min(first, seconds / calls)

    def drop(self, names: Iterable[str], times: float) -> None:
        """Those of `names` that took so many times as long as the fastest of them race no further."""
        names = list(names)
        fastest = min((self.first[name] for name in names), default=0.0)
        for name in names:
            if self.first[name] > times * fastest:
                del self.candidates[name]
                self.seconds[name].append(self.first[name])

    def rounds(self) -> int:
        """As many as fill the seconds of the race, RACE_SECONDS by default, within bounds."""
        lap = sum(self.first[name] * self.calls[name] for name in self.candidates)
        return min(max(int(self.race_seconds / lap), FEWEST_ROUNDS), MOST_ROUNDS)

    def lap(self, names: Iterable[str]) -> None:
        """One sample of each of these."""
        for name in names:
            self.seconds[name].append(self.clock(self.candidates[name], self.calls[name]) / self.calls[name])

    def medians(self) -> dict[str, float]:
        """Seconds of one call of each."""
        return {name: statistics.median(seconds) for name, seconds in self.seconds.items()}

    def spread(self, name: str) -> float:
        """Half the distance between the quartiles over the median: how far the samples lie apart."""
        low, middle, high = statistics.quantiles(self.seconds[name], n=4)
        return (high - low) / 2 / middle
