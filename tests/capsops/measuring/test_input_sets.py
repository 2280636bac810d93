"""The inputs that a GPU is timed on."""

from functools import partial

import torch

from capsops.measuring.cases import Case
from capsops.measuring.input_sets import call_each, input_sets

CPU = torch.device("cpu")


def test_inputs_take_turns() -> None:
    sets = input_sets(Case(2, 5, 3, 4, 8), CPU)
    assert len(sets) >= 2
    assert all(torch.equal(x[0][0], sets[0][0][0]) for x in sets)
    seen: list[int] = []
    call = partial(call_each, lambda inputs, grad: seen.append(inputs[0].data_ptr()), sets)
    call()
    call()
    assert seen == [x[0][0].data_ptr() for x in sets] * 2
    assert len(set(seen)) == len(sets)
