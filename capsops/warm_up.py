"""The first call of a function or a layer, made ahead of the capture of a CUDA graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from capsops.graph_capture import capturing


@contextmanager
def _side_streams(devices: list[torch.device]) -> Iterator[None]:
    """Makes a new stream of each device the current one; before and after, it waits with the one before."""
    if not devices:
        yield
        return
    first, *others = devices
    before, aside = torch.cuda.current_stream(first), torch.cuda.Stream(first)
    aside.wait_stream(before)
    with torch.cuda.stream(aside), _side_streams(others):
        yield
    before.wait_stream(aside)


def _detached(x: Any) -> Any:
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def _call(function: Callable[..., object], args: tuple, kwargs: dict[str, Any]) -> None:
    args, kwargs = pytree.tree_map(_detached, (args, kwargs))
    parameters = list(function.parameters()) if isinstance(function, torch.nn.Module) else []
    results = [x for x in pytree.tree_leaves(function(*args, **kwargs)) if isinstance(x, Tensor)]
    inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    needing = list(dict.fromkeys(x for x in (*inputs, *parameters) if x.requires_grad))
    results = [x for x in results if x.requires_grad]
    if needing and results:
        torch.autograd.grad(results, needing, [torch.ones_like(x) for x in results], allow_unused=True)


def warm_up(function: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    """Calls a function or a layer of capsops once, so that a CUDA graph can capture the next call.

    The first call chooses the implementation, and Triton compiles the kernels of its shapes, dtypes and
    options; a capture is no time for either. Where an input or a parameter requires a gradient, and gradients
    are enabled, the backward pass runs too. CUDA tensors are used on a stream of their own. Results and
    gradients are thrown away: `.grad` of inputs and parameters and the state of the random number generators
    stay as they are. Buffers of modules that are not capsops' own (the averages of a batch norm) may change.

    Args:
        function: a function or a layer of capsops, or a function or module that calls some.
        args: what it is called with. Tensors may be anywhere in lists, tuples and dicts.
        kwargs: likewise.

    Raises:
        RuntimeError: a CUDA graph is being captured.

    Example:
        >>> layer = capsops.nn.RoutingCapsules(1152, 10, 8, 16).cuda()
        >>> u = torch.randn(128, 1152, 8, device="cuda")
        >>> capsops.warm_up(layer, u)
        >>> graph = torch.cuda.CUDAGraph()
        >>> with torch.cuda.graph(graph):
        ...     v = layer(u)
        >>> graph.replay()  # computes v from what is in u
    """
    if capturing():
        raise RuntimeError("capsops.warm_up: a CUDA graph is being captured; call it before the capture")
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if isinstance(function, torch.nn.Module):
        tensors += [*function.parameters(), *function.buffers()]
    devices = sorted({x.device for x in tensors if x.device.type == "cuda"}, key=str)
    with torch.random.fork_rng([device.index for device in devices]), _side_streams(devices):
        _call(function, args, kwargs)
