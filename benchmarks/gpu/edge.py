"""What only a device shows: CUDA graphs, streams, odd addresses, the TF32 setting, second gradients."""

import traceback
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import capsops
from benchmarks.check import relative_error
from benchmarks.gpu.floor import matrix_precision
from benchmarks.gpu.record import record
from capsops import reference

DEVICE = "cuda"


def _inputs(batch: int = 33) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(batch, 100, 8, device=DEVICE) * 0.3, torch.randn(100, 10, 16, 8, device=DEVICE) * 0.3


def _error(v: Tensor, u: Tensor, weight: Tensor) -> float:
    return relative_error(v, reference.capsule_routing(u.double(), weight.double()))


def captured_first(impl: str) -> dict[str, float]:
    """The process's first call of the op, inside a graph's capture."""
    u, weight = _inputs()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        v = capsops.capsule_routing(u, weight, impl=impl)
    graph.replay()
    torch.cuda.synchronize()
    return {"error": _error(v, u, weight)}


def odd_address(impl: str) -> dict[str, float]:
    """û in bfloat16 that begins two bytes behind an aligned address."""
    u_hat = torch.randn(1 + 17 * 50 * 10 * 16, device=DEVICE).bfloat16()[1:].view(17, 50, 10, 16)
    v = capsops.dynamic_routing(u_hat, impl=impl)
    return {"error": relative_error(v, reference.dynamic_routing(u_hat.double()))}


def three_streams(impl: str) -> dict[str, float]:
    """Calls on three streams at once."""
    u, weight = _inputs()
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(capsops.capsule_routing(u, weight, impl=impl))
    torch.cuda.synchronize()
    return {"error": max(_error(v, u, weight) for v in results)}


def memory_reused(impl: str) -> dict[str, float]:
    """Calls on a side stream whose memory is free again while they run."""
    u, weight = _inputs()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(50):
            capsops.capsule_routing(u, weight, impl=impl)
            v = capsops.capsule_routing(u, weight, impl=impl)
    torch.cuda.synchronize()
    return {"error": _error(v, u, weight)}


def tf32_setting(impl: str) -> dict[str, float]:
    """Errors with torch's setting off and on: the second is larger where TF32 is used."""
    u, weight = _inputs()
    errors = {}
    for tf32 in (False, True):
        with matrix_precision(tf32):
            errors["with TF32" if tf32 else "error"] = _error(
                capsops.capsule_routing(u, weight, impl=impl), u, weight
            )
    return errors


def second_gradient(impl: str) -> dict[str, float]:
    """The gradient of a function of the gradient."""

    def run(op: Callable[..., Tensor], u: Tensor, weight: Tensor) -> Tensor:
        u, weight = u.clone().requires_grad_(), weight.clone().requires_grad_()
        (grad,) = torch.autograd.grad(op(u, weight).square().sum(), u, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), weight)[0]

    u, weight = _inputs(4)
    got = run(partial(capsops.capsule_routing, impl=impl), u, weight)
    return {"error": relative_error(got, run(reference.capsule_routing, u.double(), weight.double()))}


def compiled(impl: str) -> dict[str, float]:
    """Under torch.compile(fullgraph=True), by inductor."""
    u, weight = _inputs()
    call = torch.compile(lambda u, w: capsops.capsule_routing(u, w, impl=impl) * 2, fullgraph=True)
    return {"error": _error(call(u, weight) / 2, u, weight)}


def captured_step(impl: str) -> dict[str, float]:
    """Value and gradients in a graph, replayed with other numbers."""
    u, weight = _inputs()
    grad = torch.randn(33, 10, 16, device=DEVICE)

    def step() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (u, weight)]
        v = capsops.capsule_routing(*leaves, impl=impl)
        return v, *torch.autograd.grad(v, leaves, grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    u.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    return {"error": max(relative_error(x, y) for x, y in zip(results, step(), strict=True))}


FIRST = (captured_first,)  # in a process in which nothing has been called
REST = (
    odd_address,
    three_streams,
    memory_reused,
    tf32_setting,
    second_gradient,
    captured_step,
    compiled,
)


def run(impl: str, first: bool) -> None:
    """Each check writes a line with its errors, or with what it raised."""
    for check in FIRST if first else REST:
        try:
            record("edge", impl=impl, what=check.__name__, **check(impl))
        except Exception as error:
            traceback.print_exc()
            record(
                "edge", impl=impl, what=check.__name__, failed=f"{type(error).__name__}: {str(error)[:500]}"
            )
