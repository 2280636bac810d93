"""Sends CPU tensors to capsops.backends.cuda, above an extension whose kernels do nothing."""

import contextlib
import importlib.machinery
import importlib.util
import os
import shlex
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pybind11

from capsops import dispatch
from capsops.backends import cuda

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "benchmarks/cuda_stub.cpp", ROOT / "csrc/cuda/plan.cpp"
FLAGS = ("-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-shared", "-DNDEBUG", "-DCAPSOPS_EMULATED")


def build(folder: Path) -> Any:
    """The module _cuda, compiled from csrc/cuda/bindings.cpp with the flags of an ordinary build."""
    library = folder / "_cuda.so"
    own = [ROOT / "csrc", ROOT / "csrc/cuda", ROOT / "tests/cuda_emulator"]
    includes = [*own, sysconfig.get_path("include"), pybind11.get_include()]
    compiler = [*shlex.split(os.environ.get("CXX", "c++")), *FLAGS, *(f"-I{path}" for path in includes)]
    subprocess.run([*compiler, *SOURCES, "-o", library], check=True)
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(library))
    spec = importlib.util.spec_from_file_location("_cuda", library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _no_stream(device: int) -> int:
    return 0


@contextlib.contextmanager
def calls_on_the_cpu(extension: Any) -> Iterator[None]:
    """Inside, "auto" takes the CUDA backend for CPU tensors, with `extension` for capsops._cuda."""
    backend = replace(cuda.BACKEND, devices=("cpu",), unavailable="", needs_proof=False)
    with (
        mock.patch.object(cuda, "_cuda", extension),
        mock.patch.object(cuda, "_stream", _no_stream),
        mock.patch.object(cuda, "_workspaces", {}),
        mock.patch.dict(dispatch.BACKENDS, {"cuda": backend}),
    ):
        dispatch._automatic.cache_clear()
        try:
            yield
        finally:
            dispatch._automatic.cache_clear()
