"""What only a GPU shows of each set of kernels: graphs, streams, odd addresses, TF32, second gradients.

test_first_call_in_a_capture wants a process in which no op was called: run it by its name.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import capsops
from capsops import reference
from capsops.measuring.comparison import relative_error
from capsops.measuring.precisions import matrix_precision

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.parametrize("kernels", ["cuda", "triton"]),
]
BOUND = 1e-5  # of the relative error in float32


def layer(batch: int = 33) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    u, weight = torch.randn(batch, 100, 8) * 0.3, torch.randn(100, 10, 16, 8) * 0.3
    return u.cuda(), weight.cuda()


def error(v: Tensor, u: Tensor, weight: Tensor) -> float:
    return relative_error(v, reference.capsule_routing(u.double(), weight.double()))


def captured(call: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def test_first_call_in_a_capture(kernels: str) -> None:
    u, weight = layer()
    graph, v = captured(partial(capsops.capsule_routing, u, weight, impl=kernels))
    graph.replay()
    torch.cuda.synchronize()
    assert error(v, u, weight) < BOUND


def test_odd_address(kernels: str) -> None:
    """û in bfloat16 that begins two bytes after an aligned address."""
    u_hat = torch.randn(1 + 17 * 50 * 10 * 16, device="cuda").bfloat16()[1:].view(17, 50, 10, 16)
    v = capsops.dynamic_routing(u_hat, impl=kernels)
    assert relative_error(v, reference.dynamic_routing(u_hat.double())) < 1e-2


def test_three_streams(kernels: str) -> None:
    u, weight = layer()
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(capsops.capsule_routing(u, weight, impl=kernels))
    torch.cuda.synchronize()
    assert max(error(v, u, weight) for v in results) < BOUND


def test_memory_is_used_again(kernels: str) -> None:
    """Calls on a side stream whose memory is free again while they run."""
    u, weight = layer()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(50):
            capsops.capsule_routing(u, weight, impl=kernels)
            v = capsops.capsule_routing(u, weight, impl=kernels)
    torch.cuda.synchronize()
    assert error(v, u, weight) < BOUND


@pytest.mark.parametrize(("tf32", "bound"), [(False, BOUND), (True, 1e-2)])
def test_tf32_setting(kernels: str, tf32: bool, bound: float) -> None:
    u, weight = layer()
    with matrix_precision(tf32):
        v = capsops.capsule_routing(u, weight, impl=kernels)
    assert error(v, u, weight) < bound


def test_second_gradient(kernels: str) -> None:
    def run(op: Callable[..., Tensor], u: Tensor, weight: Tensor) -> Tensor:
        u, weight = u.clone().requires_grad_(), weight.clone().requires_grad_()
        (grad,) = torch.autograd.grad(op(u, weight).square().sum(), u, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), weight)[0]

    u, weight = layer(4)
    got = run(partial(capsops.capsule_routing, impl=kernels), u, weight)
    assert relative_error(got, run(reference.capsule_routing, u.double(), weight.double())) < BOUND


def test_compiled(kernels: str) -> None:
    u, weight = layer()
    call = torch.compile(lambda u, w: capsops.capsule_routing(u, w, impl=kernels) * 2, fullgraph=True)
    assert error(call(u, weight) / 2, u, weight) < BOUND


def test_captured_step(kernels: str) -> None:
    """Value and gradients in a graph, replayed with other numbers."""
    u, weight = layer()
    grad = torch.randn(33, 10, 16, device="cuda")

    def step() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (u, weight)]
        v = capsops.capsule_routing(*leaves, impl=kernels)
        return v, *torch.autograd.grad(v, leaves, grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph, results = captured(step)
    u.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert max(relative_error(x, y) for x, y in zip(results, step(), strict=True)) < BOUND
