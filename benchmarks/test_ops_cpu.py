"""squash, predictions and dynamic_routing on the CPU against plain PyTorch, at the sizes of the paper."""

from collections.abc import Callable

import pytest

from benchmarks.cases import Case
from benchmarks.measure import StartRace, forms, measure
from benchmarks.passes import BOTH
from benchmarks.rows import Row


@pytest.mark.parametrize("passes", BOTH)
@pytest.mark.parametrize("op", ["squash", "predictions", "dynamic_routing"])
def test_op(op: str, passes: str, race: StartRace, report: Callable[[Row], None]) -> None:
    case = Case(128, op=op)
    report(measure("ops", case, passes, forms(case), race))
