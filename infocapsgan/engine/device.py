"""Where a system is trained or measured, and which capsule kernels serve there."""

import os
from typing import Any

import torch

from capsops import dispatch
from infocapsgan.engine.distributed import Processes
from infocapsgan.engine.run_directory import RunError


def local_device(kind: str) -> torch.device:
    """What --device names: cpu, or this process's own GPU; auto takes a GPU where there is one."""
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RunError("--device: got cuda, but torch finds no GPU")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def check_impl(impl: str, device: torch.device) -> None:
    """Raises RunError, with the reason, where an implementation of the kernels does not serve a device."""
    try:
        dispatch.requested(impl, device.type)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"--impl {impl}: {error}") from error


def serving_impl(impl: str, device: torch.device) -> tuple[str, str]:
    """Which kernels serve float32 on a device; where that is plain PyTorch that nobody chose, also why."""
    asked = dispatch.asked(impl)
    name = dispatch.automatic(device.type) if asked == "auto" else asked
    if asked != "auto" or name != "reference":
        return name, ""
    return name, dispatch.why_reference(device)


def common_kernels(device: torch.device, processes: Processes, before: dict | None) -> dict[str, Any] | None:
    """Lets "auto" take kernels that are proved in all processes and in the run so far; returns which."""
    if dispatch.asked("auto") != "auto":
        return before
    proofs = processes.gather(dispatch.settle(device), device)
    return dispatch.restrict(device, proofs + ([] if before is None else [before]))
