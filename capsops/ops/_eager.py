"""Whether torch's dispatcher has anything to do for a call.

From torch.ops to a kernel written in Python, and back, the dispatcher takes longer than a tiny layer needs to
compute. In plain eager mode it only passes the call on: to what records the gradient, and to the kernel. In
that case capsops calls these itself. It does not where a mode, a transform, a tracer, autocast or a profiler
is active, nor for a tensor that is not an ordinary one, such as a FakeTensor, a DTensor, a subclass with a
__torch_function__ or a view that negates.

So two things take effect only through torch.ops.capsops: a kernel that a program registers for an op of
capsops, and an observer of calls that is not a profiler, such as a torch.profiler.ExecutionTraceObserver.
"""

import threading

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

_profiled = torch.autograd._profiler_enabled
_included = torch._C._dispatch_tls_local_include_set
_excluded = torch._C._dispatch_tls_local_exclude_set
_keys = torch._C._dispatch_keys


def _read_state() -> tuple[int, int]:
    """The dispatch keys that this thread adds to those of its tensors, and those that it removes."""
    return _included().raw_repr(), _excluded().raw_repr()


def _plain_state() -> tuple[int, int]:
    """The state of a thread in which nothing is active: a new one, since this one may be inside a mode."""
    states = []
    thread = threading.Thread(target=lambda: states.append(_read_state()))
    thread.start()
    thread.join()
    return states[0]


_INCLUDED, _EXCLUDED = _plain_state()

# The keys of ordinary tensors, on each type of device that has been met.
_plain_keys: set[int] = set()


def _has_plain_keys(x: Tensor, keys: int) -> bool:
    device = x.device.type
    if device in ("cpu", "cuda"):
        _plain_keys.add(_keys(torch.empty(0, device=device)).raw_repr())
    return keys in _plain_keys


def is_plain(*tensors: object) -> bool:
    """Whether the dispatcher would only pass on a call with these arguments, tensors or None.

    None of them has a __torch_function__. The first one has to be a tensor.
    """
    if torch.compiler.is_compiling() or _profiled() or forward_ad._current_level >= 0:
        return False
    if _included().raw_repr() != _INCLUDED or _excluded().raw_repr() != _EXCLUDED:
        return False
    for x in tensors:
        if x is None:
            continue
        if not isinstance(x, Tensor):
            return False
        keys = _keys(x).raw_repr()
        if keys not in _plain_keys and not _has_plain_keys(x, keys):
            return False
    return tensors[0] is not None


def is_plain_backward(*tensors: Tensor | None) -> bool:
    """is_plain() of the tensors of a gradient, among which may be a saved one with a __torch_function__."""
    return not has_torch_function(tensors) and is_plain(*tensors)
