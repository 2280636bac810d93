"""Kernels of the CPU in the place of a GPU's: they need a proof, and may fail in one way."""

import ctypes
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from capsops.backends import BACKENDS
from capsops.backends.backend import Backend
from capsops.measuring import trials

FAULT, KERNELS = "CAPSOPS_TEST_FAULT", "CAPSOPS_TEST_KERNELS"
FAULTY_OP = "capsule_routing"


def _hang() -> None:
    ctypes.PyDLL(None).pause()  # with Python's lock, so that no other thread runs


def _raise(error: Exception) -> None:
    raise error


FAULTS: dict[str, Callable[[], object]] = {
    "exception": lambda: _raise(RuntimeError("too many resources requested for launch")),
    "segmentation fault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "exit": lambda: os._exit(3),
    "hang": _hang,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "no memory": lambda: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
    "no host memory": lambda: _raise(MemoryError("std::bad_alloc")),
}
RESULTS = {
    "wrong": lambda v: v * 1.01,
    "NaN": lambda v: torch.full_like(v, torch.nan),
    "restless": lambda v: v + 1e-7 * torch.rand(()),
}


def faulty(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which fails as the environment variable says."""

    def call(*args: Any) -> Any:
        fault = os.environ.get(FAULT, "")
        if fault in FAULTS:
            FAULTS[fault]()
        v, s = function(*args)
        return RESULTS[fault](v) if fault in RESULTS else v, s

    return call


def backend() -> Backend:
    """The record that takes the place of that of "cpu"."""
    cpu = BACKENDS["cpu"]
    return replace(
        cpu,
        functions={**cpu.functions, FAULTY_OP: faulty(cpu.functions[FAULTY_OP])},
        dtypes=(torch.float32,),
        needs_proof=True,
        kernels=lambda device: "stand-in",
        code=lambda: os.environ.get(KERNELS, "1"),
    )


def install() -> None:
    """In a process of its own: the backend, and a check that takes a second."""
    BACKENDS["cpu"] = backend()
    del trials.QUICK_SHAPES[1:]
    trials.OPTIONS[:] = [trials.UNSQUASHED_ONLY]
