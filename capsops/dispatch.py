"""Who serves what: settles `impl`, on a GPU where the op runs, and hands out the implementation by name."""

import importlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from capsops import gpu_record
from capsops.backends import reference

IMPLS = ("auto", "reference", "cpu", "triton", "cuda")


class Service(NamedTuple):
    """One line of the table: does this implementation serve tensors of this device here, and if not, why."""

    impl: str
    device: str
    available: bool
    reason: str


def build_record() -> dict[str, dict[str, str]]:
    """What the build wrote of each extension; empty where there is no record.

    Of a record that cannot be read it says that, as of a build that failed.
    """
    path = Path(__file__).with_name("_build.json")
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
        return {name: {**facts, "built": facts["built"]} for name, facts in record.items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = f"the build record {path.name} cannot be read ({type(error).__name__}: {error})"
        failed = {"built": False, "reason": reason, "mend": "install capsops again"}
        return {"cpu": failed, "cuda": failed}


def _build_failure(extension: str) -> str:
    """What the build recorded when it could not make capsops._<extension>."""
    record = build_record()
    if not record:
        return "the extension was not built (no build record); run: pip install -e ."
    return record.get(extension, {}).get("reason") or "its build succeeded; run: pip install -e ."


def _load(name: str) -> tuple[ModuleType | None, str]:
    """capsops.backends.<name>, which stands on the extension capsops._<name>; or None and why."""
    try:
        return importlib.import_module(f"capsops.backends.{name}"), ""
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
    return importlib.import_module("capsops.backends.triton"), ""


_cpu, _cpu_missing = _load("cpu")
_triton, _triton_missing = _load_triton()
_cuda, _cuda_missing = _load("cuda")

_loaded = {"reference": reference, "cpu": _cpu, "triton": _triton, "cuda": _cuda}
_MODULES: dict[str, ModuleType] = {name: found for name, found in _loaded.items() if found is not None}

_MISSING = {"cpu": _cpu_missing, "triton": _triton_missing, "cuda": _cuda_missing}

_NO_DEVICE = "torch sees no CUDA device"

# "auto" takes the first that is available.
_PREFERENCE = {"cpu": ("cpu", "reference")}

# Where "auto" is settled when an op runs, by serving(): there it depends on the op and on the GPU.
SETTLED_LATE = ("cuda",)

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

    On a CUDA device it stays "auto": what it stands for there is settled where the op runs, by serving().

    Raises:
        TypeError: `impl` is not a str.
        ValueError: `impl` is unknown, or does not serve the device.
        RuntimeError: `impl` is not available here; the message says why.
    """
    impl = asked(impl)
    if impl == "auto":
        if device in SETTLED_LATE:
            return impl
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


def _cuda_archs() -> list[str]:
    """The architectures that capsops._cuda was built for, such as "90"; PTX does not count."""
    archs = str(build_record().get("cuda", {}).get("archs") or "")
    return [arch.strip() for arch in re.split("[;,]", archs.replace("+PTX", "")) if arch.strip()]


def _triton_release() -> str:
    """Such as "3.6"."""
    return ".".join(importlib.import_module("triton").__version__.split(".")[:2])


def _why_not_triton(release: str) -> str:
    """Why Triton's kernels are not what was proved with that release of Triton, or nothing."""
    if _MODULES["triton"].INTERPRETED:
        return "Triton runs its interpreter"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler, and there is no gcc or clang on the path, and no CC"
    here = _triton_release()
    return "" if here == release else f"proved with Triton {release}; this is {here}"


def why_not_proved(impl: str, model: str, capability: tuple[int, int]) -> str:
    """Why "auto" does not take these kernels on a GPU of that model, or nothing where it does."""
    if impl not in _MODULES:
        return _MISSING[impl]
    proof = next((p for p in gpu_record.PROOFS if (p.model, p.impl) == (model, impl)), None)
    if proof is None:
        return f"not proved on {model}"
    if impl == "triton":
        return _why_not_triton(proof.triton)
    arch, archs = "{}{}".format(*capability), _cuda_archs()
    if arch not in archs:
        return f"built for {', '.join(archs) or 'unknown architectures'}, not for {arch}"
    if not _MODULES["cuda"].device_count():
        return "the NVIDIA driver is too old for the CUDA toolkit that built it"
    return ""


@lru_cache
def _proved(index: int) -> frozenset[str]:
    """The kernels that "auto" may take on this GPU."""
    model, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    return frozenset(impl for impl in gpu_record.ORDER if not why_not_proved(impl, model, capability))


def serving(
    device: torch.device,
    dtype: torch.dtype,
    lengths: Sequence[int] = (),
    squash_output: bool = True,
) -> str:
    """What "auto" stands for where an op runs on a CUDA device: the same for an op and its gradients.

    Contexts of use_impl() have no say here: they count where a function is called.

    Args:
        device: of the tensors.
        dtype: of the tensors; float64 is the reference's.
        lengths: D of a routing op, and K where there is a weight.
        squash_output: whether the last s is squashed; the kernels for GPUs do not serve it as it is.
    """
    if dtype != torch.float64 and squash_output:
        proved = _proved(torch.cuda.current_device() if device.index is None else device.index)
        for impl in gpu_record.ORDER:
            if impl in proved and gpu_record.within_limits(impl, lengths):
                return impl
    return "reference"


def module(impl: str) -> ModuleType:
    """The implementation's functions, as listed in capsops.backends."""
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
