"""Interleaving and the choice of how many calls make a sample."""

from collections.abc import Callable

import pytest

from capsops.measuring.timing import Race, spread


class FakeClock:
    """Each call takes the seconds it returns."""

    def __init__(self) -> None:
        self.order: list[float] = []

    def __call__(self, call: Callable[[], float], calls: int) -> float:
        self.order.append(call())
        return calls * call()


def test_a_sample_is_filled() -> None:
    race = Race({"fast": lambda: 1e-6, "slow": lambda: 0.5}, clock=FakeClock(), sample=0.02)
    race.warm_up()
    assert 20_000 <= race.calls["fast"] < 100_000
    assert race.calls["slow"] == 1


@pytest.mark.parametrize(("seconds", "rounds"), [(0.001, 31), (0.25, 20), (10.0, 7)])
def test_there_are_enough_rounds(seconds: float, rounds: int) -> None:
    race = Race({"a": lambda: seconds}, clock=FakeClock(), sample=0.02)
    race.warm_up()
    assert race.rounds == rounds


def test_candidates_take_turns() -> None:
    clock = FakeClock()
    race = Race({"a": lambda: 1.0, "b": lambda: 2.0}, clock=clock)
    race.warm_up()
    clock.order.clear()
    for _ in range(3):
        race.lap(race.candidates)
    assert clock.order == [1.0, 2.0] * 3
    race.lap(["b"])
    assert clock.order[-1] == 2.0
    assert race.medians() == {"a": 1.0, "b": 2.0}


def test_the_hopeless_race_no_further() -> None:
    race = Race(
        {"ours": lambda: 9.0, "a": lambda: 1.0, "b": lambda: 2.0, "c": lambda: 5.0}, clock=FakeClock()
    )
    race.warm_up(hopeless=4)
    assert list(race.candidates) == ["ours", "a", "b"]
    race.lap(race.candidates)
    assert race.medians() == {"ours": 9.0, "a": 1.0, "b": 2.0, "c": 5.0}


def test_median_and_spread() -> None:
    race = Race({"a": lambda: None})
    race.seconds["a"] = [1.0, 1.0, 2.0, 3.0, 100.0]
    assert race.medians()["a"] == 2.0
    assert spread([2.0] * 7) == 0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(0.5)
