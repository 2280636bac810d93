"""Builds the C++ extension capsops._cpu and, on a machine for CUDA, the extension capsops._cuda, with ninja.

An extension that cannot be built does not stop the installation: capsops then runs on what is left, and the
reason goes into capsops/_build.json, from where `python -m capsops` reports it.

    CXX, CXXFLAGS, LDFLAGS        compiler and further flags
    MAX_JOBS                      how many compilers run at a time
    CAPSOPS_BUILD_CUDA=0|1|auto   never; must, or an error, as for an image that is to run elsewhere; where
                                  there are nvcc and an NVIDIA driver, libcuda.so.1 (the default)
    CAPSOPS_CUDA_ARCHS            such as "80;90+PTX" (the default)
    CUDA_HOME                     the toolkit to use, else the nvcc on the path; nvcc's own NVCC_CCBIN works
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# Compiled once per instruction set, the slowest to compile first; bindings.cpp chooses among them.
CPU_KERNELS = ("csrc/cpu/routing.cpp", "csrc/cpu/predictions.cpp", "csrc/cpu/squash.cpp")
CPU_BINDINGS = "csrc/cpu/bindings.cpp"
CUDA_SOURCES = "csrc/cuda"

HOST_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-Wall", "-Wextra")
CPU_FLAGS = (*HOST_FLAGS, "-fno-math-errno", "-ffp-contract=fast", "-fopenmp")
X86_ISAS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": (
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
    ),
}
CUDA_FLAGS = ("-O3", "-std=c++17", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra")
DEFAULT_CUDA_ARCHS = "80;90+PTX"

INSTALL_AGAIN = "then install capsops again"
FIX_COMPILER = f"install g++ 9 or clang++ 10 or newer, or name one in CXX, {INSTALL_AGAIN}"
FIX_NVCC = (
    "name architectures that this CUDA toolkit knows in CAPSOPS_CUDA_ARCHS, or a host compiler that it takes"
    f" in NVCC_CCBIN, or install another toolkit, {INSTALL_AGAIN}; CAPSOPS_BUILD_CUDA=0 does without"
)


class NotBuiltError(Exception):
    """Why an extension is not built, and what the user can do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


class NotWantedError(NotBuiltError):
    """Nothing went wrong: this extension is not for this machine, or not asked for."""


@dataclass(frozen=True)
class Step:
    """One call of a compiler or linker; paths are relative to the build folder, or absolute."""

    inputs: tuple[str, ...]
    output: str
    command: tuple[str, ...]  # without inputs, output and dependency file
    compiles: bool = True


def cpu_isas(machine: str) -> dict[str, tuple[str, ...]]:
    """Instruction sets to compile for, each with its flags, the least demanding first."""
    return X86_ISAS if machine.lower() in ("x86_64", "amd64") else {"baseline": ()}


def cuda_arch_flags(archs: str) -> list[str]:
    """nvcc's flags for a list such as "80;90+PTX"."""
    flags = []
    for entry in filter(None, archs.replace(",", ";").split(";")):
        match = re.fullmatch(r"\s*(\d{2,3}[af]?)(\+PTX)?\s*", entry)
        if match is None:
            raise ValueError(
                f"CAPSOPS_CUDA_ARCHS takes entries such as 80 or 90+PTX, got {entry!r} in {archs!r}"
            )
        arch, ptx = match.groups()
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    if not flags:
        raise ValueError(f"CAPSOPS_CUDA_ARCHS names no architecture: {archs!r}")
    return flags


def cuda_archs(environ: Mapping[str, str]) -> str:
    return environ.get("CAPSOPS_CUDA_ARCHS") or DEFAULT_CUDA_ARCHS


def cuda_choice(environ: Mapping[str, str]) -> str:
    choice = environ.get("CAPSOPS_BUILD_CUDA") or "auto"
    if choice not in ("0", "1", "auto"):
        raise ValueError(f"CAPSOPS_BUILD_CUDA takes 0, 1 or auto, got {choice!r}")
    return choice


def job_flags(environ: Mapping[str, str]) -> list[str]:
    jobs = environ.get("MAX_JOBS", "")
    if not jobs:
        return []
    if not jobs.isdigit() or int(jobs) < 1:
        raise ValueError(f"MAX_JOBS takes a number of processes, at least 1, got {jobs!r}")
    return ["-j", jobs]


def cpu_steps(
    compiler: Sequence[str],
    includes: Sequence[str],
    machine: str,
    environ: Mapping[str, str],
    system: str = sys.platform,
) -> list[Step]:
    """How capsops._cpu is compiled and linked."""
    flags = (*CPU_FLAGS, *shlex.split(environ.get("CXXFLAGS", "")), "-I", str(ROOT / "csrc"))
    bindings = (*compiler, *flags, *(part for path in includes for part in ("-isystem", path)))
    isas = cpu_isas(machine)
    steps = [
        Step(
            (str(ROOT / source),),
            f"{Path(source).stem}.{isa}.o",
            (*compiler, *flags, f"-DCAPSOPS_ISA={isa}", *isa_flags),
        )
        for source in CPU_KERNELS
        for isa, isa_flags in isas.items()
    ]
    steps.append(Step((str(ROOT / CPU_BINDINGS),), "bindings.o", bindings))
    # Where an inline function that was not inlined stands in several objects, the linker keeps the first
    # copy: this order makes it the one that runs on every processor.
    objects = ["bindings.o", *(f"{Path(source).stem}.{isa}.o" for isa in isas for source in CPU_KERNELS)]
    link = (*compiler, "-shared", "-fopenmp", *shlex.split(environ.get("LDFLAGS", "")))
    if system == "darwin":
        link += ("-undefined", "dynamic_lookup")
    return [*steps, Step(tuple(objects), "_cpu.so", link, compiles=False)]


def cuda_steps(
    nvcc: str, sources: Sequence[Path], includes: Sequence[str], environ: Mapping[str, str]
) -> list[Step]:
    """How capsops._cuda is compiled and linked: all of it by nvcc, which leaves C++ to the host compiler."""
    system = tuple(part for path in includes for part in ("-isystem", path))
    archs = cuda_arch_flags(cuda_archs(environ))
    command = (nvcc, *CUDA_FLAGS, *archs, "-I", str(ROOT / "csrc"))
    # Only the bindings see these paths, which pip makes anew for each build: the others stay compiled.
    commands = {"bindings": (*command, *system)}
    steps = [
        Step((str(source),), f"{source.name}.o", commands.get(source.stem, command)) for source in sources
    ]
    link = (nvcc, "-shared", "-cudart", "static")
    return [*steps, Step(tuple(step.output for step in steps), "_cuda.so", link, compiles=False)]


def ninja_text(steps: Sequence[Step]) -> str:
    """The steps as a build.ninja."""

    def path(name: str) -> str:
        return name.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        "rule compile",
        "  command = $tool -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compiling $out",
        "rule link",
        "  command = $tool $in -o $out",
        "  description = linking $out",
    ]
    for step in steps:
        rule = "compile" if step.compiles else "link"
        lines.append(f"build {path(step.output)}: {rule} {' '.join(map(path, step.inputs))}")
        lines.append(f"  tool = {shlex.join(step.command).replace('$', '$$')}")
    return "\n".join(lines) + "\n"


def first_error(ninja_output: str, lines: int = 12) -> str:
    """The first lines that the failed command of a ninja run printed, without ninja's own."""
    output = ninja_output.splitlines()
    failed = [number for number, line in enumerate(output) if line.startswith("FAILED:")]
    if not failed:
        return "\n".join(output[:lines])
    printed = output[failed[0] + 2 :]  # "FAILED: object", the command line, then what the command printed
    said = list(takewhile(lambda line: not re.match(r"\[\d+/\d+\]|ninja: |FAILED:", line), printed))
    return "\n".join(said[:lines]) or "the compiler printed nothing"


def find_compiler(environ: Mapping[str, str]) -> list[str]:
    if environ.get("CXX"):
        return shlex.split(environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise NotBuiltError(
        "no C++ compiler: CXX is not set and there is no c++, g++ or clang++ on the path", FIX_COMPILER
    )


def probe(compiler: Sequence[str], source: str, flags: Sequence[str]) -> str | None:
    """What the compiler says when it makes a shared library of one line; None when it succeeds."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.cpp").write_text(source + "\n")
        command = [*compiler, "-std=c++17", "-shared", "-fPIC", *flags, "probe.cpp", "-o", "probe.so"]
        try:
            result = subprocess.run(
                command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        except OSError as error:
            return str(error)
    if result.returncode == 0:
        return None
    said = "\n".join(result.stdout.splitlines()[:6])
    return said or f"it printed nothing and ended with status {result.returncode}"


def check_compiler(compiler: Sequence[str], python_include: str) -> None:
    name = shlex.join(compiler)
    for source, flags, cannot, remedy in (
        ("int one() { return 1; }", [], "cannot compile one line of C++17", FIX_COMPILER),
        (
            "#include <Python.h>",
            ["-I", python_include],
            "does not find Python's headers",
            f"install them (Debian: apt install python3-dev), {INSTALL_AGAIN}",
        ),
        (
            "#include <omp.h>\nint threads() { return omp_get_max_threads(); }",
            ["-fopenmp"],
            "has no OpenMP",
            f"use g++ (CXX=g++), or install clang's OpenMP (Debian: apt install libomp-dev), {INSTALL_AGAIN}",
        ),
    ):
        said = probe(compiler, source, flags)
        if said is not None:
            raise NotBuiltError(f"the compiler {name} {cannot}: {said}", remedy)


def first_line(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def find_ninja() -> str:
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise NotBuiltError("there is no ninja", f"pip install ninja, {INSTALL_AGAIN}") from None
        return found
    return str(Path(ninja.BIN_DIR, "ninja"))


def extension_includes() -> list[str]:
    try:
        import pybind11
    except ImportError:
        raise NotBuiltError("there is no pybind11", f"pip install pybind11, {INSTALL_AGAIN}") from None
    return [sysconfig.get_path("include"), pybind11.get_include()]


def run_ninja(steps: Sequence[Step], folder: Path, remedy: str) -> Path:
    """Brings the last step's output up to date; `remedy` is what helps where a compiler fails."""
    ninja = find_ninja()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_text(steps))
    command = [ninja, *job_flags(os.environ)]
    output = []
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            sys.stdout.write(line)
            output.append(line)
    if process.returncode != 0:
        raise NotBuiltError(f"compilation failed: {first_error(''.join(output))}", remedy)
    return folder / steps[-1].output


def build_cpu(folder: Path) -> tuple[Path, dict[str, object]]:
    compiler = find_compiler(os.environ)
    includes = extension_includes()
    check_compiler(compiler, includes[0])
    machine = platform.machine()
    library = run_ninja(cpu_steps(compiler, includes, machine, os.environ), folder, FIX_COMPILER)
    return library, {
        "compiler": first_line([*compiler, "--version"]),
        "flags": " ".join(CPU_FLAGS),
        "isas": {isa: " ".join(flags) for isa, flags in cpu_isas(machine).items()},
    }


def has_cuda_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def build_cuda(folder: Path) -> tuple[Path, dict[str, object]]:
    choice = cuda_choice(os.environ)
    if choice == "0":
        raise NotWantedError("CAPSOPS_BUILD_CUDA was 0", f"unset CAPSOPS_BUILD_CUDA, {INSTALL_AGAIN}")
    sources = sorted(path for path in (ROOT / CUDA_SOURCES).glob("*") if path.suffix in (".cu", ".cpp"))
    if not sources:
        raise NotWantedError("this version of capsops has no CUDA sources", "a later version will have them")
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which("nvcc", path=str(Path(home, "bin")))) or shutil.which("nvcc")
    if nvcc is None:
        raise NotWantedError(
            "there is no nvcc on the path or in CUDA_HOME",
            f"install the CUDA toolkit and set CUDA_HOME to it, {INSTALL_AGAIN}",
        )
    if choice == "auto" and not has_cuda_driver():
        raise NotWantedError(
            "there is no NVIDIA driver here (libcuda.so.1)",
            f"install the driver, or set CAPSOPS_BUILD_CUDA=1 to build for another machine, {INSTALL_AGAIN}",
        )
    library = run_ninja(cuda_steps(nvcc, sources, extension_includes(), os.environ), folder, FIX_NVCC)
    return library, {
        "compiler": nvcc_release(nvcc),
        "flags": " ".join(CUDA_FLAGS),
        "archs": cuda_archs(os.environ),
    }


def nvcc_release(nvcc: str) -> str:
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release .*", version)
    return f"nvcc {match.group() if match else version.strip()}"


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def install_library(library: Path, target: Path) -> None:
    """By way of a new file: a process that has the old one mapped keeps it whole."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copyfile(library, temporary)
    temporary.chmod(0o755)
    temporary.replace(target)


class BuildExtensions(build_ext):
    """Runs ninja in build/, puts what it made into the package and notes there what was not made."""

    def run(self) -> None:
        must_have_cuda = cuda_choice(os.environ) == "1"
        self.written: list[str] = []
        record: dict[str, dict[str, object]] = {}
        package = ROOT / "capsops" if self.inplace else Path(self.build_lib, "capsops")
        package.mkdir(parents=True, exist_ok=True)
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        build = ROOT / "build" / f"native{Path(suffix).stem}"
        for name, make in (("cpu", build_cpu), ("cuda", build_cuda)):
            target = package / f"_{name}{suffix}"
            try:
                library, facts = make(build / name)
            except NotBuiltError as error:
                if name == "cuda" and must_have_cuda:
                    raise SystemExit(
                        f"CAPSOPS_BUILD_CUDA=1: {error.reason}\nTo fix it: {error.remedy}"
                    ) from error
                target.unlink(missing_ok=True)
                record[name] = {"built": False, "reason": error.reason, "remedy": error.remedy}
                if not isinstance(error, NotWantedError):
                    warn_not_built(name, error)
            else:
                install_library(library, target)
                self.written.append(target.name)
                record[name] = {"built": True, **facts}
        write_atomically(package / "_build.json", json.dumps(record, indent=2) + "\n")
        self.written.append("_build.json")

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib, "capsops", name)) for name in self.written]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        return {output: str(Path("capsops", Path(output).name)) for output in self.get_outputs()}


def warn_not_built(name: str, error: NotBuiltError) -> None:
    rule = "*" * 100
    print(
        f"{rule}\ncapsops._{name} IS NOT BUILT; capsops is installed without it.\n{error.reason}\n"
        f"To fix it: {error.remedy}. `python -m capsops` says this again.\n{rule}",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    # The extensions are named so that wheels carry the platform's tag; BuildExtensions does the rest.
    names = ("capsops._cpu", "capsops._cuda")
    setup(
        ext_modules=[Extension(name, sources=[], optional=True) for name in names],
        cmdclass={"build_ext": BuildExtensions},
    )
