"""What surrounds the kernels: a whole training step against its parts, and the cost of a call."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import RoutingCase, bound, exact, plain
from benchmarks.check import relative_error
from benchmarks.empty_op import empty
from benchmarks.measure import Start, measure
from benchmarks.passes import BOTH, FORWARD_BACKWARD, run
from benchmarks.rows import Row, Target
from benchmarks.test_routing_cpu import ours
from benchmarks.training_step import Step
from capsops import dispatch

SUITE = "around the kernels"


def by_einsum(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return peers.einsum(u, weight, bias, 3)


@pytest.mark.parametrize("width", [16, 64])
def test_training_step(width: int, race: Start, report: Callable[[Row], None]) -> None:
    """Two pools of threads that wait for work by spinning would make the whole slower than the parts."""
    step = Step.build(128, width)
    einsum = partial(step.whole, peers.squash, by_einsum)
    for found, wanted in zip(step.whole(), einsum(), strict=True):
        assert relative_error(found, wanted.double()) < 1e-4
    parts = {"convolutions": step.convolutions_alone, "capsules": step.capsules_alone}
    timed = race(step.whole, {**parts, "einsum": einsum}, hopeless=math.inf)
    found = timed.medians()
    impl = dispatch.automatic("cpu")
    row = Row(SUITE, "CapsNet step", f"B=128 width {width}", FORWARD_BACKWARD, impl=impl)
    row.seconds, row.spread = found["ours"], timed.spread("ours")
    row.details = {part: found[part] for part in parts}
    report(replace(row, peers={"einsum": found["einsum"]}))
    row.peers = {"sum of its parts": sum(row.details.values())}
    row.targets = [Target("ratio", 1, row.ratio)]
    report(row)


@pytest.mark.parametrize("passes", BOTH)
def test_cost_of_a_call(passes: str, race: Start, report: Callable[[Row], None]) -> None:
    """A layer so small that the call is all of its time, beside plain PyTorch and an op that does nothing."""
    case = RoutingCase(1, 8, 2, 4, 4)
    inputs, grad = case.inputs()
    row = Row(
        SUITE,
        "capsule_routing",
        str(case),
        passes,
        impl=dispatch.automatic("cpu"),
    )
    forms = {name: bound(form, case) for name, form in peers.with_compiled(peers.ROUTING).items()}
    truth = plain(case, passes), exact(case, passes), case.in_capsules * case.in_dim
    floor = {"empty op": partial(run, empty, passes, inputs, grad), "torch.neg": partial(torch.neg, grad)}
    measure(
        row,
        bound(ours, case),
        forms,
        inputs,
        grad,
        *truth,
        lambda us, them: race(us, {**them, **floor}, math.inf),
    )
    row.details = {name: row.peers.pop(name) for name in floor}
    report(row)
    report(replace(row, peers={"empty op": row.details["empty op"]}))
