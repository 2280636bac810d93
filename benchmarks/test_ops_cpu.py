"""squash, predictions and dynamic_routing on the CPU against plain PyTorch, at the sizes of the paper."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import capsops
from benchmarks import peers
from benchmarks.measure import Function, Start, measure
from benchmarks.passes import BOTH, run
from benchmarks.rows import Row
from capsops import dispatch, reference

CASE = "B=128 1152×10"
U, WEIGHT, U_HAT = (128, 1152, 8), (1152, 10, 16, 8), (128, 1152, 10, 16)


def report_op(
    op: str,
    passes: str,
    shapes: tuple[tuple[int, ...], ...],
    terms: int,
    functions: tuple[Function, Function, dict[str, Function]],
    race: Start,
    report: Callable[[Row], None],
) -> None:
    """`functions`: ours, the reference, the peers; `terms`: of the longest sum."""
    ours, formula, forms = functions
    inputs = [torch.randn(shape) * 0.3 for shape in shapes]
    grad = torch.randn_like(formula(*inputs))

    def by_reference(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return run(formula, passes, [x.to(dtype).requires_grad_() for x in inputs], grad.to(dtype))

    row = Row("ops", op, CASE, passes, impl=dispatch.automatic("cpu"))
    truth = by_reference(torch.float32), by_reference(torch.float64), terms
    leaves = [x.clone().requires_grad_() for x in inputs]
    measure(row, ours, peers.with_compiled(forms), leaves, grad, *truth, race)
    report(row)


@pytest.mark.parametrize("passes", BOTH)
def test_squash(passes: str, race: Start, report: Callable[[Row], None]) -> None:
    functions = capsops.squash, reference.squash, peers.SQUASH
    report_op("squash", passes, (U,), U[-1], functions, race, report)


@pytest.mark.parametrize("passes", BOTH)
def test_predictions(passes: str, race: Start, report: Callable[[Row], None]) -> None:
    functions = capsops.predictions, reference.predictions, peers.PREDICTIONS
    report_op("predictions", passes, (U, WEIGHT), 160, functions, race, report)


@pytest.mark.parametrize("passes", BOTH)
def test_dynamic_routing(passes: str, race: Start, report: Callable[[Row], None]) -> None:
    forms = {name: partial(f, bias=None, iterations=3) for name, f in peers.DYNAMIC_ROUTING.items()}
    functions = capsops.dynamic_routing, reference.dynamic_routing, forms
    report_op("dynamic_routing", passes, (U_HAT,), U_HAT[1], functions, race, report)
