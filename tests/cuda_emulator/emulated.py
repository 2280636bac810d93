"""Builds the CUDA kernels for the CPU and calls them through capsops.backends.cuda with CPU tensors."""

import ctypes
import importlib.machinery
import importlib.util
import math
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import ninja
import pybind11
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
FLAGS = (
    *("-Og", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-DCAPSOPS_EMULATED"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"),
)


def sources() -> list[Path]:
    kernels = [path for path in (ROOT / "csrc/cuda").iterdir() if path.suffix in (".cu", ".cpp")]
    kernels.remove(ROOT / "csrc/cuda/bindings.cpp")  # modules.cpp includes it
    return sorted(kernels, key=lambda path: -path.stat().st_size) + sorted(HERE.glob("*.cpp"))


def build(folder: Path) -> Path:
    """Compiles kernels, bindings and emulator into one library, with the modules _cuda and emulator."""
    includes = [ROOT / "csrc", HERE]
    system = [sysconfig.get_path("include"), pybind11.get_include()]
    compiler = [*shlex.split(os.environ.get("CXX", "c++")), *FLAGS, *(f"-I{path}" for path in includes)]
    compiler += [part for path in system for part in ("-isystem", path)]
    objects = [(path, f"{path.name}.o") for path in sources()]
    lines = [
        *("rule compile", f"  command = {shlex.join(compiler)} -x c++ -c $in -o $out"),
        *("rule link", f"  command = {compiler[0]} -shared $in -o $out"),
        *(f"build {name}: compile {path}" for path, name in objects),
        f"build emulated.so: link {' '.join(name for _, name in objects)}",
    ]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    ninja_run = subprocess.run([Path(ninja.BIN_DIR, "ninja")], cwd=folder, capture_output=True, text=True)
    assert ninja_run.returncode == 0, ninja_run.stdout
    return folder / "emulated.so"


def load(name: str, library: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_file_location(name, library, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def load_implementation(extension: ModuleType) -> ModuleType:
    """A separate copy of capsops/backends/cuda.py that uses `extension` in place of capsops._cuda."""
    spec = importlib.util.spec_from_file_location("emulated_cuda", ROOT / "capsops/backends/cuda.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"capsops._cuda": extension}):
        spec.loader.exec_module(module)
    return module


class Emulated:
    """The CUDA kernels on an emulated device.

    Every call runs twice: with the threads in forward order, every tensor at the end of its pages and
    asynchronous copies as early as possible; and with the threads in backward order, every tensor at the
    beginning of its pages and copies as late as possible. Both must give the same bits.
    """

    def __init__(self, library: Path) -> None:
        self.device = load("emulator", library)
        self.extension = load("_cuda", library)
        self.implementation = load_implementation(self.extension)
        self.implementation._stream = lambda device: 0
        self.implementation._empty = lambda like, *shape, dtype=None: self._empty(shape, dtype or like.dtype)
        self.at_end = True

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        size = count * dtype.itemsize
        address = self.device.allocate(size, self.at_end)
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(tuple(shape))

    def guarded(self, x: Any) -> Any:
        """A copy of a tensor in guarded memory, aligned to 16 bytes if its storage_offset() is."""
        if not isinstance(x, Tensor):
            return x
        offset = x.storage_offset() % (16 // x.dtype.itemsize)
        return self._empty((offset + x.numel(),), x.dtype)[offset:].view(x.shape).copy_(x)

    def call(self, name: str, *arguments: Any, **device: Any) -> tuple[Tensor, ...]:
        """The results of a function of capsops.backends.cuda; `device` is passed to emulator.set()."""
        runs = []
        for backwards in (False, True):
            self.device.set(backwards=backwards, late_copies=backwards, **device)
            self.at_end = not backwards
            try:
                results = getattr(self.implementation, name)(*map(self.guarded, arguments))
                results = (results,) if isinstance(results, Tensor) else results
                runs.append([x.clone() for x in results])
            finally:
                self.device.check_and_free()
        for n, (one, other) in enumerate(zip(*runs, strict=True)):
            same = one.contiguous().view(torch.uint8) == other.contiguous().view(torch.uint8)
            assert same.all(), (
                f"{name}, result {n}: {(~same).sum()} bytes depend on the order of threads and copies"
            )
        return tuple(runs[0])
