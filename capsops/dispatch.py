"""Which backend computes a call.

A function of capsops asks requested() what the caller wants, by `impl`, use_impl() or CAPSOPS_IMPL. The op
asks chosen() when it runs, since the graph that it runs in may have been traced or exported on another
machine.
"""

import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache, reduce
from operator import and_
from typing import Any, NamedTuple

import torch

from capsops.backends import BACKENDS, reference
from capsops.backends.backend import NO_OPTIONS, Backend
from capsops.backends.device import Device, facts
from capsops.proofs import order
from capsops.proofs import standing as standing_of
from capsops.proofs.scope import NOTHING, Scope, every_op
from capsops.proofs.standing import Standing

IMPLS = ("auto", *BACKENDS)
_NO_DEVICE = "torch sees no CUDA device"


class Service(NamedTuple):
    """Whether a backend takes tensors on a type of device here, and if not, why."""

    impl: str
    device: str
    available: bool
    reason: str


def _checked(impl: str, origin: str) -> str:
    names = ", ".join(map(repr, IMPLS))
    if not isinstance(impl, str):
        raise TypeError(f"{origin}: got {type(impl).__name__}, takes one of {names}")
    if impl not in IMPLS:
        raise ValueError(f"{origin}: got {impl!r}, takes one of {names}")
    return impl


class _Choice:
    """What impl="auto" means as long as it is the last of _choices."""

    def __init__(self, impl: str) -> None:
        self.impl = impl


# A list: torch.compile guards on it, which it cannot do for a context variable.
_choices = [_Choice(_checked(os.environ.get("CAPSOPS_IMPL") or "auto", "environment variable CAPSOPS_IMPL"))]


class use_impl:
    """Context manager: the backend that calls with impl="auto" take, in the whole process.

    Args:
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Raises:
        TypeError: `impl` is not a str.
        ValueError: `impl` is none of these.
    """

    def __init__(self, impl: str) -> None:
        self.impl = _checked(impl, "impl")
        self.entered: list[_Choice] = []

    def __enter__(self) -> None:
        self.entered.append(_Choice(self.impl))
        _choices.append(self.entered[-1])

    def __exit__(self, *error: object) -> None:
        choice = self.entered.pop()
        if torch.compiler.is_compiling():  # contexts nest there, and torch 2.6 cannot trace remove()
            _choices.pop()
        else:  # where contexts of several threads overlap, one's own is not always the last
            _choices.remove(choice)


def asked(impl: str) -> str:
    """The name that a call gives: `impl`, or for "auto" that of use_impl() or CAPSOPS_IMPL."""
    if not isinstance(impl, str):
        _checked(impl, "impl")
    return _choices[-1].impl if impl == "auto" else impl


def requested(impl: str, device: str) -> str:
    """What a call asks for: "auto", or the name of a backend that takes tensors on this type of device.

    Raises:
        TypeError: `impl` is not a str.
        ValueError: `impl` is unknown, or the backend does not take tensors on the device.
        RuntimeError: the backend is not available here; the message says why.
    """
    impl = asked(impl)
    if impl == "auto":
        return impl
    backend = BACKENDS[_checked(impl, "impl")]
    if reason := _why_unavailable(backend, device):
        raise RuntimeError(f"impl={impl!r} is not available: {reason}")
    if not backend.takes_device(device):
        raise ValueError(
            f"impl={impl!r} takes tensors on {', '.join(backend.devices)}, got tensors on {device}"
        )
    return impl


def _why_unavailable(backend: Backend, device: str) -> str:
    if backend.unavailable:
        return backend.unavailable
    if device != "cuda" and backend.devices == ("cuda",) and not torch.cuda.is_available():
        return _NO_DEVICE
    return ""


class _Standings:
    """What is proved on each device, settled when it is first asked for, and the same from then on.

    So a forward pass, its gradient and a recomputation of it are computed by one backend.
    """

    def __init__(self) -> None:
        self.settled: dict[tuple[str, Device], Standing] = {}
        self.warned: set[Device] = set()
        self.lock = threading.Lock()

    def of(self, backend: Backend, device: Device) -> Standing:
        standing = self.settled.get((backend.name, device))
        if standing is None:
            with self.lock:
                standing = self.settled.get((backend.name, device))
                if standing is None:
                    standing = self.settled[backend.name, device] = standing_of.settle(backend, device)
        return standing

    def warn(self, device: Device, reasons: list[str]) -> None:
        """Says once for each device why the reference serves in the place of kernels."""
        if device not in self.warned:
            self.warned.add(device)
            warnings.warn(
                f"capsops: plain PyTorch, which is slower, serves calls on {device.torch_name}"
                f" ({device.model}): {'; '.join(reasons)}",
                stacklevel=2,
            )


_standings = _Standings()


def _after_fork() -> None:
    """Another thread may have been settling something; it does not exist in this process."""
    _standings.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def device_facts(device: torch.device) -> Device:
    """What is known of a device; that of the current GPU where "cuda" has no index."""
    if device.type == "cuda":
        return facts("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return facts(device.type, 0)


@lru_cache(maxsize=4096)
def _automatic(
    op: str, device: torch.device, dtype: torch.dtype, shapes: order.Shapes, options: frozenset[str]
) -> Backend:
    """What "auto" takes: the first in the order that computes the call and needs no proof, or has one.

    The reference, unless it is first in the order anyway, serves where nothing else does; where û would not
    fit into the device's memory, kernels that come after it in the order are tried as well.
    """
    candidates = [
        backend
        for backend in BACKENDS.values()
        if not backend.unavailable
        and backend.takes_device(device.type)
        and not backend.why_declined(op, dtype, options)
    ]
    known, sizes, reasons = device_facts(device), order.sizes(op, shapes), []
    name = str(dtype).removeprefix("torch.")
    by_name = {backend.name: backend for backend in candidates}
    for each in order.order(op, name, sizes, known):
        backend = by_name.get(each)
        if backend is None:
            continue
        if backend is reference.BACKEND and not order.fits(sizes, dtype.itemsize, known.memory):
            continue
        if not backend.needs_proof:
            break
        standing = _standings.of(backend, known)
        if standing.scope.covers(op, name, sizes.lengths, options):
            return backend
        if standing.remedy:
            reasons.append(f"{backend.name}: {standing.why_not}. What to do: {standing.remedy}")
    else:
        backend = reference.BACKEND
    if reasons and backend is reference.BACKEND:
        _standings.warn(known, reasons)
    return backend


def chosen(
    op: str,
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    shapes: order.Shapes = (),
    options: frozenset[str] = NO_OPTIONS,
) -> Backend:
    """The backend that computes a call; an op and its gradients ask alike and get the same.

    Args:
        op: the name of its function.
        impl: "auto" or the name of a backend. Contexts of use_impl() do not count here.
        device: of the tensors.
        dtype: of the tensors.
        shapes: of u and W, or of û; empty for squash.
        options: those of capsops.backends.backend that the call uses.

    Raises:
        ValueError: `impl` is unknown, or the backend does not support the call; the message says why.
        RuntimeError: the backend is not available here; the message says why.
    """
    if impl == "auto":
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return _automatic(op, device, dtype, shapes, options)
    backend = BACKENDS[requested(impl, device.type)]
    if reason := backend.why_declined(op, dtype, options):
        raise ValueError(reason)
    return backend


def settle(device: torch.device) -> dict[str, Any]:
    """What is proved on a device, by backend, as restrict() takes it: plain dicts, which JSON has too.

    Backends are settled in their order, as the first calls would, until one serves every op without options.
    """
    known, proved = device_facts(device), {}
    for name in order.ORDER:
        backend = BACKENDS[name]
        if backend.needs_proof and not backend.unavailable and backend.takes_device(device.type):
            scope = _standings.of(backend, known).scope
            proved[name] = scope.to_json()
            if every_op() <= scope.calls:
                break
    return proved


def restrict(device: torch.device, proofs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """From here on "auto" takes on the device only what all of several settle() name; returns that.

    For processes that train one model, each with a GPU, and for a run that goes on elsewhere: all of them
    then compute a call by the same kernels. Calls before this are not affected, so it belongs at the start.
    """
    known, common = device_facts(device), {}
    asked = {name for each in proofs for name in each}
    for backend in BACKENDS.values():
        if len(proofs) == 1 and backend.name not in asked:
            continue  # one process may settle it at its first call
        if backend.needs_proof and backend.takes_device(device.type):
            scopes = [Scope.from_json(each.get(backend.name, NOTHING.to_json())) for each in proofs]
            scope = reduce(and_, scopes)
            standing = _standings.settled.get((backend.name, known), Standing())
            if scope != standing.scope:
                why_not = "not proved in every process of this run, or not asked for at its start"
                remedy = "run `python -m capsops check` on each of its machines, then start it anew"
                standing = Standing(scope, standing.proof, why_not, remedy)
            _standings.settled[backend.name, known] = standing
            common[backend.name] = scope.to_json()
    _automatic.cache_clear()
    return common


def why_reference(device: torch.device) -> str:
    """Why no kernels serve on a device, for each backend that takes it; nothing is settled."""
    reasons = {}
    for backend in BACKENDS.values():
        if backend is not reference.BACKEND and backend.takes_device(device.type):
            reason = backend.unavailable
            if not reason and backend.needs_proof:
                standing = _standings.settled.get((backend.name, device_facts(device)))
                reason = standing.why_not if standing else "not asked"
            reasons[backend.name] = reason
    return "; ".join(f"{name}: {reason.splitlines()[0]}" for name, reason in reasons.items() if reason)


def describe() -> list[Service]:
    """Every backend with the types of devices it takes, and the reason where it is not available."""
    no_device = "" if torch.cuda.is_available() else _NO_DEVICE
    rows = []
    for device in ("cpu", "cuda"):
        for backend in BACKENDS.values():
            if backend.takes_device(device):
                reason = backend.unavailable or (no_device if device == "cuda" else "")
                rows.append(Service(backend.name, device, not reason, reason))
    return rows


def automatic(device: str) -> str:
    """The name of the backend that impl="auto" takes for float32 tensors on this type of device."""
    return chosen("capsule_routing", asked("auto"), torch.device(device), torch.float32).name
