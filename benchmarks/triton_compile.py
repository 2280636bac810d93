"""Compiles, without a GPU, the very kernels that a call would launch on one, and reads their resources.

The call itself runs, on tensors without memory; each launch compiles its kernel for the target instead.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from capsops.measuring.precisions import matrix_precision

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# Shared memory that one program may have, in bytes (CUDA C++ programming guide, compute capabilities; local
# data share of CDNA 3).
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


@dataclass(frozen=True)
class Compiled:
    """One launch: the kernel as compiled for the target, and how many programs would run."""

    kernel: str
    programs: int
    options: dict[str, Any]
    artifact: Any
    arguments: tuple[Any, ...] = ()  # by position

    @property
    def title(self) -> str:
        flags = [
            name.lower() for name in ("UNIFORM", "GRADIENT", "NEEDS_U", "NEEDS_W") if self.options.get(name)
        ]
        return " ".join([self.kernel.removesuffix("_kernel"), *self.options.get("OF", ""), *flags])


@dataclass(frozen=True)
class Resources:
    """What a program takes: registers, stack and spills of a thread, shared memory, code."""

    registers: int
    stack: int  # bytes
    spills: int  # loads and stores of spilled registers, on AMD the registers spilled
    shared: int  # bytes
    instructions: Counter[str]

    @property
    def tensor_core(self) -> int:
        """Instructions of the matrix unit."""
        return sum(n for name, n in self.instructions.items() if _MATRIX_UNIT.match(name))


def room(needs: Resources, warps: int) -> int:
    """How many programs of `warps` warps a multiprocessor of sm_90 has room for.

    It has 4 parts, each with 16,384 registers, which a warp takes 256 at a time, and for 16 warps; and 228 KB
    of shared memory, of which each program takes 1 KB more than it uses (CUDA C++ programming guide).
    """
    registers = -(-needs.registers // 8) * 8 * 32
    in_registers = 4 * min(16384 // registers, 16) // warps
    return min(in_registers, (228 << 10) // (needs.shared + 1024), 32)


_MATRIX_UNIT = re.compile(r"(HMMA|HGMMA|UTCHMMA|OMMA)$|v_mfma_")


@contextmanager
def compiling(target: str, tf32: bool = False) -> Iterator[list[Compiled]]:
    """Launches inside compile for the target and are listed; nothing runs. TF32 is allowed or not."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton's interpreter is on (TRITON_INTERPRET), which compiles nothing")
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_only(
        self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any
    ) -> None:
        artifact = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append(Compiled(self.fn.__name__, grid[0], options, artifact, args))

    driver = SimpleNamespace(  # what Triton asks of a driver before it launches
        get_current_target=lambda: TARGETS[target],
        get_current_device=lambda: target,  # the key under which Triton keeps what it compiled
        get_current_stream=lambda device: 0,
    )
    hip = "AMD" if TARGETS[target].backend == "hip" else None
    with (
        matrix_precision(tf32),
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(torch.version, "hip", hip),
    ):
        yield compiled


def _cuobjdump(option: str, cubin: str) -> str:
    """What the tool of the CUDA toolkit prints: the one that Triton carries, else the one on the path."""
    carried = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    tool = carried if carried.exists() else "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def resources(compiled: Compiled) -> Resources:
    """Reads registers, stack, spills and instructions from the binary, or from AMD's assembly."""
    return (_nvidia_resources if "cubin" in compiled.artifact.asm else _amd_resources)(compiled)


def _nvidia_resources(compiled: Compiled) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.artifact.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if numbers is None:
        raise ValueError(f"cuobjdump -res-usage names no registers: {usage!r}")
    instruction = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)"
    names = Counter(re.findall(instruction, code, re.MULTILINE))
    shared = compiled.artifact.metadata.shared
    return Resources(int(numbers[1]), int(numbers[2]), names["LDL"] + names["STL"], shared, names)


def _amd_resources(compiled: Compiled) -> Resources:
    code = compiled.artifact.asm["amdgcn"]
    numbers = {key: int(n) for key, n in re.findall(r"^\s*\.(\w+):\s+(\d+)", code, re.MULTILINE)}
    names = Counter(re.findall(r"^\s+((?:s|v|ds|global|buffer|flat|scratch)_\w+)", code, re.MULTILINE))
    keys = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    return Resources(*(numbers[key] for key in keys), compiled.artifact.metadata.shared, names)
