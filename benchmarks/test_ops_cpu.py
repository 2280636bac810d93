"""The ops on the CPU against plain PyTorch, as a rule at the sizes of the paper: time, ceiling, memory."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

import capsops
from benchmarks import memory
from benchmarks.measure import StartRace, forms, measure
from benchmarks.rows import Row, Target
from capsops.measuring import peers
from capsops.measuring.cases import Case
from capsops.measuring.passes import BOTH, FORWARD, FORWARD_BACKWARD, run
from capsops.measuring.timing import Race

# To be reached, by batch: forward, forward and backward.
RATIOS = {128: (10, 6), 16: (2, 2), 4: (1.6, 2), 3: (1.6, 2), 2: (1.6, 2), 1: (1.6, 2)}
OP_RATIO = 0.9  # of an op by itself, at every batch
NOT_SLOWER = 0.97  # of 16 bits, beside float32; what is missing to 1 is noise
LARGE = Case(batch=16, in_capsules=3872, out_capsules=196)
LARGE_BYTES = 128 << 20


def add_memory(row: Row, case: Case) -> None:
    if memory.available():
        row.memory = memory.peak_memory("ours", case, row.passes)
        row.peers_memory = {"einsum": memory.peak_memory("einsum", case, row.passes)}


@pytest.mark.parametrize("passes", BOTH)
@pytest.mark.parametrize("batch", [128, 16, 4, 1])
@pytest.mark.parametrize("op", ["squash", "predictions"])
def test_op(op: str, batch: int, passes: str, race: StartRace, report: Callable[[Row], None]) -> None:
    case = Case(batch, op=op)
    row = measure("ops", case, passes, forms(case), race)
    row.targets.append(Target("ratio", OP_RATIO, row.ratio))
    report(row)


@pytest.mark.parametrize("passes", BOTH)
def test_dynamic_routing(passes: str, race: StartRace, report: Callable[[Row], None]) -> None:
    case = Case(128, op="dynamic_routing")
    report(measure("ops", case, passes, forms(case), race))


@pytest.mark.parametrize("passes", BOTH)
@pytest.mark.parametrize("batch", list(RATIOS))
def test_routing(batch: int, passes: str, race: StartRace, report: Callable[[Row], None]) -> None:
    case = Case(batch)
    row = measure("routing", case, passes, forms(case), race)
    add_memory(row, case)
    row.targets.append(Target("ratio", RATIOS[batch][BOTH.index(passes)], row.ratio))
    if (batch, passes) == (128, FORWARD):
        row.targets.append(Target("share", 0.55, row.share))
    if (batch, passes) == (128, FORWARD_BACKWARD) and row.memory is not None:
        row.targets.append(Target("memory ratio", 25, row.peers_memory["einsum"] / max(row.memory, 1)))
    report(row)


@pytest.mark.parametrize("passes", BOTH)
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_routing_16_bit(precision: str, passes: str, race: StartRace, report: Callable[[Row], None]) -> None:
    """16 bits are storage here: the arithmetic is float32, and the peer is the same call in float32."""
    case = Case(128)
    float32 = partial(run, case.bind(capsops.capsule_routing), passes, *case.inputs())

    def beside_float32(calls: dict[str, Callable[[], object]]) -> Race:
        return race({**calls, "ours in float32": float32})

    case = replace(case, precision=precision)
    row = measure("routing", case, passes, {"ours": capsops.capsule_routing}, beside_float32)
    row.targets.append(Target("ratio", NOT_SLOWER, row.ratio))
    report(row)


def test_routing_of_many_output_capsules(race: StartRace, report: Callable[[Row], None]) -> None:
    """A shape at which people run out of memory: û takes 741 MiB. The only peer is einsum, eager."""
    candidates = {"ours": capsops.capsule_routing, "einsum": peers.einsum}
    row = measure("routing", LARGE, FORWARD_BACKWARD, candidates, race)
    add_memory(row, LARGE)
    if row.memory is not None:
        row.targets.append(Target("memory", LARGE_BYTES, row.memory, most=True))
    report(row)
