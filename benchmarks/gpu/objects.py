"""Compiles for sm_90 what routing needs of csrc/cuda, and the program that records its launches."""

import ast
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# As setup.py compiles them, for one architecture.
FLAGS = ("-O3", "-std=c++17", "-DNDEBUG", "-arch=sm_90", f"-I{ROOT / 'csrc'}")
PRECISIONS = ("tf32", "bfloat16", "float32")  # as the sources are named: fused_tf32.cu
# Of other ops, and what the calls that are recorded don't reach.
_OTHERS = ("bindings", "squash", "predictions", "smem_cached", "routing_general")
_KINDS = (*PRECISIONS, "float16", "precomputed")
_RECORDER = Path(__file__).parent / "probes/recorded_launches.cpp"


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=str(Path(home, "bin")))) or shutil.which("nvcc")


def _run(command: Sequence[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr or done.stdout}")
    return done.stdout


@cache
def _flags_of() -> dict[str, tuple[str, ...]]:
    """CUDA_FLAGS_OF of setup.py, which cannot be imported: the flags of single sources, by pattern."""
    assigned = [x for x in ast.parse((ROOT / "setup.py").read_text()).body if isinstance(x, ast.Assign)]
    value = next(x.value for x in assigned if ast.unparse(x.targets[0]) == "CUDA_FLAGS_OF")
    return ast.literal_eval(value)


@cache
def nvcc_version() -> str:
    return _run([nvcc() or "nvcc", "--version"]).splitlines()[-2].removeprefix("Cuda compilation tools, ")


def _fingerprint() -> str:
    """Of all that the objects are made from."""
    digest = hashlib.sha256(f"{nvcc_version()} {FLAGS[:-1]} {_flags_of()}".encode())
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".h", ".cu", ".cpp", ".cuh"):
            digest.update(path.read_bytes())
    digest.update(_RECORDER.read_bytes())
    return digest.hexdigest()[:16]


def compile_to(source: Path, to: Path, flags: Sequence[str] = FLAGS) -> Path:
    """An object, or with -cubin a cubin, unless it is there already."""
    if not to.exists():
        to.parent.mkdir(parents=True, exist_ok=True)
        temporary = to.with_name(f"{os.getpid()}-{to.name}")
        own = [flag for stem, flags in _flags_of().items() if fnmatch(source.stem, stem) for flag in flags]
        _run(
            [nvcc() or "nvcc", *flags, *own, "-c" if to.suffix == ".o" else "-cubin", source, "-o", temporary]
        )
        temporary.replace(to)
    return to


def sources(precision: str) -> list[Path]:
    """Those of routing in this precision."""
    without = (*_OTHERS, *(f"_{kind}" for kind in _KINDS if kind != precision))
    files = [*(ROOT / "csrc/cuda").glob("*.cu"), *(ROOT / "csrc/cuda").glob("*.cpp")]
    return sorted(path for path in files if not path.stem.endswith(without))


@cache
def objects(precision: str) -> list[Path]:
    """The compiled sources, from which cuobjdump reads the machine code."""
    folder = ROOT / "build/gpu_counts" / _fingerprint()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compile_to, path, folder / f"{path.name}.o") for path in sources(precision)]
        return [job.result() for job in jobs]


@cache
def recorder(precision: str) -> Path:
    """The program recorded_launches, linked with the objects but without the CUDA runtime."""
    made = objects(precision)
    folder = made[0].parent
    own = compile_to(_RECORDER, folder / "recorded_launches.o")
    program, temporary = (
        folder / f"recorded_launches_{precision}",
        folder / f"{os.getpid()}-recorded_launches",
    )
    # Kernels that are not compiled here stay unresolved: nothing calls them.
    link = ["-static", "-no-pie", "-Wl,--unresolved-symbols=ignore-all"]
    _run(["g++", "-o", temporary, own, *made, *link])
    temporary.replace(program)
    return program
