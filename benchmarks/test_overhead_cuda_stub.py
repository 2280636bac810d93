"""What a call of the CUDA kernels costs in Python, without a GPU: capsule_routing on CPU tensors.

The path is that of a call on a GPU with impl="auto": the function, the op with the checks of its arguments,
the choice of the backend, autograd, capsops/backends/cuda.py, and the bindings of csrc/cuda, compiled here,
with the conversion of their arguments and their checks. Left out are the kernels and their launch, the plan
of the work, CUDA itself (the current device, the stream, the device's limits), and the thread in which
autograd computes gradients on a GPU; memory comes from torch's allocator for the CPU. With backward the time
includes torch.autograd.grad() itself.

Beside it, an autograd.Function with as many tensors that allocates as many results and does nothing else:
what is left where capsops costs nothing. Targets, printed and not asserted: 30 µs forward, 120 µs forward and
backward.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import capsops
from benchmarks import cuda_stub
from benchmarks.measure import StartRace
from benchmarks.rows import Row, Target
from capsops.measuring.cases import Case
from capsops.measuring.passes import FORWARD, FORWARD_BACKWARD, run

TARGETS = {FORWARD: 30e-6, FORWARD_BACKWARD: 120e-6}  # seconds
CASE = Case(batch=1, in_capsules=8, out_capsules=2, out_dim=4, in_dim=4)


class Empty(torch.autograd.Function):
    """The results and gradients of a routing call, of the right shapes; their numbers are arbitrary."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(u, weight, bias)
        return u.new_empty(len(u), *bias.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cuda_stub.build(tmp_path_factory.mktemp("cuda_stub"))


@pytest.fixture
def stub(extension: Any) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with cuda_stub.calls_on_the_cpu(extension):
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("passes", TARGETS)
@pytest.mark.usefixtures("stub")
def test_overhead(passes: str, race: StartRace, report: Callable[[Row], None]) -> None:
    (u, weight), grad = CASE.inputs()
    inputs = u, weight, torch.zeros(CASE.out_capsules, CASE.out_dim, requires_grad=True)
    if passes == FORWARD:
        inputs = tuple(x.detach() for x in inputs)
    row = Row("overhead of the CUDA backend, kernels left out", CASE.op, str(CASE), passes, impl="cuda")
    ours = partial(run, capsops.capsule_routing, passes, inputs, grad)
    shapes = [x.shape for x in ours()]
    assert shapes == [grad.shape, *(x.shape for x in inputs if passes == FORWARD_BACKWARD)]
    row.take_times(race({"ours": ours, "empty Function": partial(run, Empty.apply, passes, inputs, grad)}))
    row.targets = [Target("seconds", TARGETS[passes], row.seconds, most=True)]
    report(row)
