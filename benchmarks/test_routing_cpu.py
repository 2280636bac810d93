"""capsule_routing on the CPU against plain PyTorch: time, share of the ceiling, memory."""

from collections.abc import Callable

import pytest
from torch import Tensor

import capsops
from benchmarks import memory, peers
from benchmarks.cases import Routing, RoutingCase, bound, exact, plain
from benchmarks.ceiling import Ceiling
from benchmarks.measure import Start, measure
from benchmarks.operations import routing_operations
from benchmarks.passes import BOTH, FORWARD, FORWARD_BACKWARD
from benchmarks.rows import Row, Target
from capsops import dispatch

RATIOS = {  # to be reached, by batch and passes
    (128, FORWARD): 10,
    (128, FORWARD_BACKWARD): 5,
    (16, FORWARD): 2,
    (16, FORWARD_BACKWARD): 2,
    (1, FORWARD): 1,
    (1, FORWARD_BACKWARD): 1,
}
LARGE = RoutingCase(batch=16, in_capsules=3872, out_capsules=196)
LARGE_BYTES = 128 << 20


def ours(u: Tensor, weight: Tensor, bias: Tensor | None, iterations: int) -> Tensor:
    return capsops.capsule_routing(u, weight, bias, iterations=iterations)


def measured(case: RoutingCase, passes: str, forms: dict[str, Routing], race: Start, ceiling: Ceiling) -> Row:
    """The row of a case, without memory and targets."""
    impl = dispatch.automatic("cpu")
    row = Row("routing", "capsule_routing", str(case), passes, case.dtype, impl)
    functions = {name: bound(form, case) for name, form in forms.items()}
    inputs, grad = case.inputs()
    truth = plain(case, passes), exact(case, passes), case.in_capsules * case.in_dim
    measure(row, bound(ours, case), functions, inputs, grad, *truth, race)
    row.operations = routing_operations(case, passes)
    row.share = row.operations / row.seconds / ceiling.flops
    return row


def add_memory(row: Row, case: RoutingCase, threads: int, *names: str) -> None:
    if memory.available():
        row.memory = memory.peak_memory(memory.CAPSOPS, case, row.passes, threads)
        row.peers_memory = {name: memory.peak_memory(name, case, row.passes, threads) for name in names}


@pytest.mark.parametrize("passes", BOTH)
@pytest.mark.parametrize("batch", [128, 16, 1])
def test_routing(
    batch: int, passes: str, race: Start, ceiling: Ceiling, threads: int, report: Callable[[Row], None]
) -> None:
    case = RoutingCase(batch)
    row = measured(case, passes, peers.with_compiled(peers.ROUTING), race, ceiling)
    add_memory(row, case, threads, "einsum")
    row.targets.append(Target("ratio", RATIOS[batch, passes], row.ratio))
    if (batch, passes) == (128, FORWARD):
        row.targets.append(Target("share", 0.5, row.share))
    if (batch, passes) == (128, FORWARD_BACKWARD) and row.memory is not None:
        row.targets.append(Target("memory ratio", 25, row.peers_memory["einsum"] / max(row.memory, 1)))
    report(row)


@pytest.mark.parametrize("passes", BOTH)
def test_routing_bfloat16(passes: str, race: Start, ceiling: Ceiling, report: Callable[[Row], None]) -> None:
    """16 bits are storage here: the arithmetic is float32, and so is the ceiling."""
    case = RoutingCase(128, dtype="bfloat16")
    report(measured(case, passes, peers.with_compiled(peers.ROUTING), race, ceiling))


def test_routing_of_many_output_capsules(
    race: Start, ceiling: Ceiling, threads: int, report: Callable[[Row], None]
) -> None:
    """A shape at which people run out of memory; û alone has 741 MiB. The only peer is einsum, eager."""
    row = measured(LARGE, FORWARD_BACKWARD, {"einsum": peers.einsum}, race, ceiling)
    add_memory(row, LARGE, threads, "einsum")
    if row.memory is not None:
        row.targets.append(Target("memory", LARGE_BYTES, row.memory, most=True))
    report(row)
