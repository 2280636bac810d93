"""capsule_routing on the CPU against plain PyTorch: time, share of the ceiling, memory."""

from collections.abc import Callable

import pytest

import capsops
from benchmarks import memory, peers
from benchmarks.cases import Case
from benchmarks.measure import StartRace, forms, measure
from benchmarks.passes import BOTH, FORWARD, FORWARD_BACKWARD
from benchmarks.rows import Row, Target

RATIOS = {  # to be reached, by batch and passes
    (128, FORWARD): 10,
    (128, FORWARD_BACKWARD): 5,
    (16, FORWARD): 2,
    (16, FORWARD_BACKWARD): 2,
    (1, FORWARD): 1,
    (1, FORWARD_BACKWARD): 1,
}
LARGE = Case(batch=16, in_capsules=3872, out_capsules=196)
LARGE_BYTES = 128 << 20


def add_memory(row: Row, case: Case) -> None:
    if memory.available():
        row.memory = memory.peak_memory(memory.CAPSOPS, case, row.passes)
        row.peers_memory = {"einsum": memory.peak_memory("einsum", case, row.passes)}


@pytest.mark.parametrize("passes", BOTH)
@pytest.mark.parametrize("batch", [128, 16, 1])
def test_routing(batch: int, passes: str, race: StartRace, report: Callable[[Row], None]) -> None:
    case = Case(batch)
    row = measure("routing", case, passes, forms(case), race)
    add_memory(row, case)
    row.targets.append(Target("ratio", RATIOS[batch, passes], row.ratio))
    if (batch, passes) == (128, FORWARD):
        row.targets.append(Target("share", 0.5, row.share))
    if (batch, passes) == (128, FORWARD_BACKWARD) and row.memory is not None:
        row.targets.append(Target("memory ratio", 25, row.peers_memory["einsum"] / max(row.memory, 1)))
    report(row)


@pytest.mark.parametrize("passes", BOTH)
def test_routing_bfloat16(passes: str, race: StartRace, report: Callable[[Row], None]) -> None:
    """16 bits are storage here: the arithmetic is float32, and so is the ceiling."""
    case = Case(128, dtype="bfloat16")
    report(measure("routing", case, passes, forms(case), race))


def test_routing_of_many_output_capsules(race: StartRace, report: Callable[[Row], None]) -> None:
    """A shape at which people run out of memory; û alone has 741 MiB. The only peer is einsum, eager."""
    candidates = {"ours": capsops.capsule_routing, "einsum": peers.einsum}
    row = measure("routing", LARGE, FORWARD_BACKWARD, candidates, race)
    add_memory(row, LARGE)
    if row.memory is not None:
        row.targets.append(Target("memory", LARGE_BYTES, row.memory, most=True))
    report(row)
