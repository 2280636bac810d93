"""Which backend computes a call.

A function of capsops asks requested() what the caller wants, by `impl`, use_impl() or CAPSOPS_IMPL. The op
asks chosen() when it runs, since the graph that it runs in may have been traced or exported on another
machine.
"""

import os
from functools import lru_cache
from typing import NamedTuple

import torch

from capsops import gpu_record
from capsops.backends import BACKENDS, reference
from capsops.backends.backend import NO_OPTIONS, Backend

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


@lru_cache
def proofs(index: int) -> dict[str, gpu_record.Proof]:
    """The proofs that hold on a GPU, by the backend's name; the same as long as the process lives."""
    model, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    return {
        name: proof
        for name, backend in BACKENDS.items()
        if not why_not_proved(backend, model, capability) and (proof := gpu_record.proof(model, name))
    }


def why_not_proved(backend: Backend, model: str, capability: tuple[int, int]) -> str:
    """Why "auto" does not take a backend on a GPU of this model; empty where it does."""
    if backend.unavailable or not backend.needs_proof:
        return backend.unavailable
    proof = gpu_record.proof(model, backend.name)
    return f"not proved on {model}" if proof is None else backend.why_not_proved(proof, capability)


@lru_cache(maxsize=1024)
def _automatic(
    op: str, device: torch.device, dtype: torch.dtype, lengths: tuple[int, ...], options: frozenset[str]
) -> Backend:
    proved = {}
    if device.type == "cuda":
        proved = proofs(device.index)
    for backend in reversed(BACKENDS.values()):
        if backend.unavailable or not backend.takes_device(device.type):
            continue
        if backend.needs_proof and not (
            backend.name in proved and proved[backend.name].covers(lengths, options)
        ):
            continue
        if not backend.why_declined(op, dtype, options):
            return backend
    return reference.BACKEND


def chosen(
    op: str,
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    lengths: tuple[int, ...] = (),
    options: frozenset[str] = NO_OPTIONS,
) -> Backend:
    """The backend that computes a call; an op and its gradients ask alike and get the same.

    Args:
        op: the name of its function.
        impl: "auto" or the name of a backend. Contexts of use_impl() do not count here.
        device: of the tensors.
        dtype: of the tensors.
        lengths: D of a routing op, and K where there is a weight.
        options: those of capsops.backends.backend that the call uses.

    Raises:
        ValueError: `impl` is unknown, or the backend does not support the call; the message says why.
        RuntimeError: the backend is not available here; the message says why.
    """
    if impl == "auto":
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return _automatic(op, device, dtype, lengths, options)
    backend = BACKENDS[requested(impl, device.type)]
    if reason := backend.why_declined(op, dtype, options):
        raise ValueError(reason)
    return backend


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
