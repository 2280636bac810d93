"""Whether torch's dispatcher has anything to do for a call.

From torch.ops to a kernel written in Python, and back, the dispatcher takes longer than a tiny layer
computes. In plain eager mode it only passes the call on: to what records the gradient, and to the kernel.
There Python calls these itself. It does not where a mode, a transform, a tracer, autocast or a profiler is
active, nor for a tensor that is not an ordinary one, such as a FakeTensor, a DTensor or a view that negates.
"""

import threading

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

_included = torch._C._dispatch_tls_local_include_set
_excluded = torch._C._dispatch_tls_local_exclude_set
_keys = torch._C._dispatch_keys


def _read_state() -> tuple[int, int]:
    """The dispatch keys that this thread adds to those of its tensors, and those that it removes."""
    return _included().raw_repr(), _excluded().raw_repr()


def _in_new_thread() -> tuple[int, int]:
    """The state of a thread in which nothing is active; this one may import capsops inside a mode."""
    states = []
    thread = threading.Thread(target=lambda: states.append(_read_state()))
    thread.start()
    thread.join()
    return states[0]


_INCLUDED, _EXCLUDED = _in_new_thread()

# The keys of ordinary tensors, for each type of device on which there have been some.
_plain: dict[str, int] = {}
_all_plain: set[int] = set()


def _has_plain_keys(x: Tensor, keys: int) -> bool:
    device = x.device.type
    if device not in ("cpu", "cuda"):
        return False
    if device not in _plain:
        _plain[device] = _keys(torch.empty(0, device=device)).raw_repr()
        _all_plain.add(_plain[device])
    return keys == _plain[device]


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether the dispatcher would only pass on a call with these tensors."""
    if torch.compiler.is_compiling() or profiler._is_profiler_enabled or forward_ad._current_level >= 0:
        return False
    if _included().raw_repr() != _INCLUDED or _excluded().raw_repr() != _EXCLUDED:
        return False
    for x in tensors:
        if x is not None:
            keys = _keys(x).raw_repr()
            if keys not in _all_plain and not _has_plain_keys(x, keys):
                return False
    return True
