"""What a call costs besides its arithmetic: a tiny capsule_routing beside torch's attention, on one thread.

Both are so small that dispatch and autograd take nearly all of their time. Targets, printed and not asserted:
at most 3.5 times attention's time forward, 4 forward with the gradient recorded, 2 forward and backward.
"""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import capsops
from benchmarks.measure import StartRace
from benchmarks.rows import Row, Target
from capsops import dispatch
from capsops.measuring.cases import Case, exact, plain
from capsops.measuring.comparison import check
from capsops.measuring.passes import FORWARD, FORWARD_BACKWARD, RECORDED, run

TARGETS = {FORWARD: 3.5, RECORDED: 4, FORWARD_BACKWARD: 2}  # times as long as attention, at most
CASE = Case(batch=1, in_capsules=8, out_capsules=2, out_dim=4, in_dim=4)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("passes", TARGETS)
@pytest.mark.usefixtures("one_thread")
def test_overhead(passes: str, race: StartRace, report: Callable[[Row], None]) -> None:
    layer, (inputs, grad) = CASE.bind(capsops.capsule_routing), CASE.inputs()
    *attended, upstream = torch.randn(4, 1, 1, 8, 4).unbind()
    attended = [x.requires_grad_() for x in attended]
    row = Row("overhead", CASE.op, str(CASE), passes, impl=dispatch.automatic("cpu"))
    results = run(layer, passes, inputs, grad)
    row.error = check("capsops", results, plain(CASE, passes), exact(CASE, passes), CASE.terms)
    ours = partial(run, layer, passes, inputs, grad)
    attention = partial(run, scaled_dot_product_attention, passes, attended, upstream)
    row.take_times(race({"ours": ours, "attention": attention}))
    row.targets = [Target("overhead", TARGETS[passes], 1 / row.ratio, most=True)]
    report(row)
