"""One row: every candidate is checked, then all are timed in turns."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

from benchmarks.check import check
from benchmarks.passes import run
from benchmarks.rows import Row
from benchmarks.timing import Race

Function = Callable[..., Tensor]
Start = Callable[..., Race]  # (ours, peers) -> a race that was run


def measure(
    row: Row,
    ours: Function,
    peers: Mapping[str, Function],
    inputs: Sequence[Tensor],
    grad: Tensor,
    plain: Sequence[Tensor],
    exact: Sequence[Tensor],
    terms: int,
    race: Start,
) -> None:
    """Fills in errors and times; `plain`, `exact` and `terms` are those of `check`."""
    calls = {
        name: partial(run, function, row.passes, inputs, grad)
        for name, function in {"capsops": ours, **peers}.items()
    }
    errors = {name: check(name, call(), plain, exact, terms) for name, call in calls.items()}
    row.error = errors["capsops"]
    timed = race(calls.pop("capsops"), calls)
    row.peers = timed.medians()
    row.seconds = row.peers.pop("ours")
    row.spread = timed.spread("ours")
