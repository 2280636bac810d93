"""Who serves what: settles `impl` before an op is called, and hands out the implementation by name."""

import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from capsops.impl import reference

IMPLS = ("auto", "reference", "cpu", "triton", "cuda")


class Service(NamedTuple):
    """One line of the table: does this implementation serve tensors of this device here, and if not, why."""

    impl: str
    device: str
    available: bool
    reason: str


def _build_failure(extension: str) -> str:
    """What the build recorded when it could not make capsops._<extension>."""
    record = Path(__file__).with_name("_build.json")
    if not record.exists():
        return "the extension was not built (no build record); run: pip install -e ."
    failure = json.loads(record.read_text()).get(extension, {}).get("reason")
    return failure or "its build succeeded; run: pip install -e ."


def _load(name: str) -> tuple[ModuleType | None, str]:
    """capsops.impl.<name>, which stands on the extension capsops._<name>; or None and why."""
    try:
        return importlib.import_module(f"capsops.impl.{name}"), ""
    except ImportError as error:
        return None, f"capsops._{name} cannot be imported ({error}): {_build_failure(name)}"


def _load_triton() -> tuple[ModuleType | None, str]:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return None, f"Triton cannot be imported: {error}"
    if not hasattr(triton, "__version__"):
        where = getattr(triton, "__file__", None) or list(triton.__path__)
        return None, f"Triton is not installed: what is called triton is {where}"
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 6):
        return None, f"Triton {triton.__version__} is too old: the kernels take 3.6 or newer"
    return importlib.import_module("capsops.impl.triton"), ""


_cpu, _cpu_missing = _load("cpu")
_triton, _triton_missing = _load_triton()
_cuda, _cuda_missing = _load("cuda")

_loaded = {"reference": reference, "cpu": _cpu, "triton": _triton, "cuda": _cuda}
_MODULES: dict[str, ModuleType] = {name: found for name, found in _loaded.items() if found is not None}

_MISSING = {"cpu": _cpu_missing, "triton": _triton_missing, "cuda": _cuda_missing}

_NO_DEVICE = "torch sees no CUDA device"

# "auto" takes the first that is available; a kernel stands before the reference on a CUDA device only where
# a row of benchmarks/results/GPU_LEDGER.md shows it right and faster on real hardware.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("reference",)}

_DEVICES = {"cpu": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)}
if _triton is not None and _triton.INTERPRETED:
    _DEVICES["triton"] = ("cpu", "cuda")


def _checked(impl: str, origin: str) -> str:
    names = ", ".join(map(repr, IMPLS))
    if not isinstance(impl, str):
        raise TypeError(f"{origin}: got {type(impl).__name__}, takes one of {names}")
    if impl not in IMPLS:
        raise ValueError(f"{origin}: got {impl!r}, takes one of {names}")
    return impl


class _Choice:
    """What impl="auto" stands for as long as it is the last of _choices."""

    def __init__(self, impl: str) -> None:
        self.impl = impl


# A list: torch.compile guards on it, which it cannot do for a context variable.
_choices = [_Choice(_checked(os.environ.get("CAPSOPS_IMPL") or "auto", "environment variable CAPSOPS_IMPL"))]


class use_impl:
    """Context manager: the implementation that calls with impl="auto" take, in the whole process.

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
    """The implementation that a call names: `impl`, or for "auto" what use_impl or CAPSOPS_IMPL says."""
    if not isinstance(impl, str):
        _checked(impl, "impl")
    return _choices[-1].impl if impl == "auto" else impl


def resolve(impl: str, device: str) -> str:
    """The implementation that serves a call: `impl` itself, or what "auto" stands for on that device type.

    Raises:
        TypeError: `impl` is not a str.
        ValueError: `impl` is unknown, or does not serve the device.
        RuntimeError: `impl` is not available here; the message says why.
    """
    impl = asked(impl)
    if impl == "auto":
        for name in _PREFERENCE.get(device, ("reference",)):
            if name in _MODULES:
                return name
    if impl not in _MODULES:
        _checked(impl, "impl")
        raise RuntimeError(f"impl={impl!r} is not available: {_MISSING[impl]}")
    if impl == "cuda" and device != "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"impl={impl!r} is not available: {_NO_DEVICE}")
    devices = _DEVICES.get(impl)
    if devices is not None and device not in devices:
        raise ValueError(f"impl={impl!r} serves tensors on {', '.join(devices)}, got tensors on {device}")
    return impl


def module(impl: str) -> ModuleType:
    """The implementation's functions, as listed in capsops.impl."""
    return _MODULES[impl]


def describe() -> list[Service]:
    """The table of implementations and devices, with the reason where one is not available."""
    rows = []
    for device in ("cpu", "cuda"):
        no_device = _NO_DEVICE if device == "cuda" and not torch.cuda.is_available() else ""
        for impl in IMPLS[1:]:
            if device in _DEVICES.get(impl, ("cpu", "cuda")):
                reason = no_device if impl in _MODULES else _MISSING[impl]
                rows.append(Service(impl, device, not reason, reason))
    return rows
