"""The Triton kernels: for tensors on GPUs, and on the CPU where Triton runs its interpreter.

No atomics: every sum is made in a fixed order, so that a call gives the same bits every time. Nothing is
tuned or synchronised at call time.
"""

import importlib
import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from capsops.backends import fingerprint
from capsops.backends.backend import ALL_OPTIONS, Backend, by_name
from capsops.backends.device import Device
from capsops.backends.extension import hash_of

_OLDEST = (3, 6)


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number of a version."""
    return tuple(int(number) for number in version.split(".")[:2])


def why_unavailable() -> str:
    """Why the installed Triton cannot run the kernels; empty where it can."""
    try:
        triton: Any = importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    if not hasattr(triton, "__version__"):
        where = getattr(triton, "__file__", None) or list(triton.__path__)
        return f"Triton is not installed: the module called triton is {where}"
    if _release(triton.__version__) < _OLDEST:
        return f"Triton {triton.__version__} is too old: the kernels need 3.6 or newer"
    return ""


def why_interpreter_fails(triton_version: str, numpy_version: str) -> str:
    """Why Triton's interpreter cannot run the kernels with this NumPy; empty where it can."""
    if _release(triton_version) < (3, 7) and _release(numpy_version) >= (2, 4):
        return (
            f"the interpreter of Triton {triton_version} fails with NumPy 2.4 and newer, got {numpy_version};"
            " run: pip install 'numpy<2.4', or install Triton 3.7 or newer"
        )
    return ""


def why_not_on(device: Device) -> str:
    """Why the kernels cannot run on a GPU; empty where they can."""
    from capsops.backends.triton.launch import INTERPRETED

    if INTERPRETED:
        return "Triton runs its interpreter"
    if device.why_too_old:
        return device.why_too_old
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler, and there is no gcc or clang on the path, and no CC"
    return ""


@lru_cache
def _sources() -> str:
    return fingerprint.triton(Path(__file__).parent)


def kernels(device: Device) -> str:
    """The sources' fingerprint and the release of Triton, which compiles them."""
    installed = ".".join(map(str, _release(importlib.import_module("triton").__version__)))
    return f"{_sources()} Triton {installed}"


@lru_cache
def code() -> str:
    return hash_of(*sorted(Path(__file__).parent.glob("*.py")))


def _backend() -> Backend:
    if reason := why_unavailable():
        return Backend("triton", {}, devices=("cuda",), unavailable=reason)

    import numpy
    import triton

    from capsops.backends.triton.capsule_routing import capsule_routing, capsule_routing_backward
    from capsops.backends.triton.couplings import couplings
    from capsops.backends.triton.dynamic_routing import dynamic_routing, dynamic_routing_backward
    from capsops.backends.triton.launch import INTERPRETED
    from capsops.backends.triton.predictions import predictions, predictions_backward
    from capsops.backends.triton.squash import squash, squash_backward

    return Backend(
        name="triton",
        functions=by_name(
            squash,
            squash_backward,
            predictions,
            predictions_backward,
            dynamic_routing,
            dynamic_routing_backward,
            capsule_routing,
            capsule_routing_backward,
            couplings,
        ),
        devices=("cpu", "cuda") if INTERPRETED else ("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        options=ALL_OPTIONS,
        unavailable=why_interpreter_fails(triton.__version__, numpy.__version__) if INTERPRETED else "",
        needs_proof=True,
        why_not_on=why_not_on,
        kernels=kernels,
        compiles=True,
        code=code,
    )


BACKEND = _backend()
