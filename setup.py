"""Builds the C++ extension capsops._cpu and, on a machine for CUDA, the extension capsops._cuda, with ninja.

An extension that cannot be built does not stop the installation: capsops then runs on what is left, and the
reason goes into capsops/_build.json, from where `python -m capsops` reports it.

    CXX, CXXFLAGS, LDFLAGS        compiler and further flags for capsops._cpu
    MAX_JOBS                      how many compilers run at a time
    CAPSOPS_BUILD_CUDA=0|1|auto   never; must, or an error, as for an image that is to run elsewhere; where
                                  there are nvcc and an NVIDIA driver, libcuda.so.1 (the default)
    CAPSOPS_CUDA_ARCHS            such as "80;90+PTX"; by default machine code for 80, 86, 89, 90, 100 and
                                  120, those that nvcc knows, and PTX of the newest for GPUs to come
    TORCH_CUDA_ARCH_LIST          where that is not set: "8.0;9.0+PTX", "Ampere Hopper" or "native", as
                                  torch's extensions take it; what is older than 8.0 is left out
    CUDA_HOME                     the toolkit to use, else the nvcc on the path; nvcc's own NVCC_CCBIN works
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path

import ninja
import pybind11
from ninja.ninja_syntax import Writer
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

HOST_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-Wall", "-Wextra")
CPU_FLAGS = (*HOST_FLAGS, "-fno-math-errno", "-ffp-contract=fast", "-fopenmp")
# The kernels are compiled once for each of these; bindings.cpp chooses among them.
X86_ISAS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
    ),
}
CUDA_FLAGS = ("-O3", "-std=c++17", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra")
# Of single sources. With less optimisation ptxas moves fewer products ahead, so that their registers suffice.
CUDA_FLAGS_OF = {"passes_float32": ("-Xptxas=-O1",), "passes_backward_*": ("-Xptxas=-O1",)}
# With tensor cores for bfloat16 and TF32, and asynchronous copies: what the kernels are written with.
OLDEST_CUDA_ARCH = 80
DEFAULT_CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
# As torch.utils.cpp_extension reads them in TORCH_CUDA_ARCH_LIST.
TORCH_ARCH_NAMES = {
    "Kepler+Tesla": "3.7",
    "Kepler": "3.5+PTX",
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}

FIX_COMPILER = (
    "install g++ 9 or clang++ 10 or newer, OpenMP and Python's headers (Debian: apt install g++ python3-dev,"
    " for clang also libomp-dev), or name a compiler in CXX"
)
FIX_NVCC = (
    "name architectures that this CUDA toolkit knows in CAPSOPS_CUDA_ARCHS, such as 80;90+PTX, or a host"
    " compiler that it supports in NVCC_CCBIN, or install another toolkit, or do without"
    " (CAPSOPS_BUILD_CUDA=0)"
)

STARS = "*" * 100

# An object file with its source and the flags that compile it.
Objects = dict[str, tuple[Path, Sequence[str]]]


class NotBuiltError(Exception):
    """Why an extension is not built, and what the user can do about it."""

    def __init__(self, reason: str, remedy: str, failed: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = f"{remedy}, then install capsops again"
        self.failed = failed  # else it is not for this machine, or not asked for


def cpu_isas(machine: str) -> dict[str, tuple[str, ...]]:
    """Instruction sets to compile for, each with its flags, the least demanding first."""
    return X86_ISAS if machine.lower() in ("x86_64", "amd64") else {"baseline": ()}


def cuda_arch_flags(archs: str) -> list[str]:
    """nvcc's flags for a list such as "80;90+PTX"; nvcc itself refuses what is no architecture.

    86, 87 and 89 are compiled from the PTX of 80: that is the same machine code, instruction for instruction,
    and nvcc makes PTX, which takes two thirds of its time, once.
    """
    flags = []
    for arch in re.split("[;,]", re.sub(r"\s", "", archs)):
        number = arch.removesuffix("+PTX")
        if arch in ("86", "87", "89"):
            flags.append(f"-gencode=arch=compute_80,code=sm_{arch}")
            continue
        codes = ("sm", "compute") if arch.endswith("+PTX") else ("sm",)
        flags += [f"-gencode=arch=compute_{number},code={code}_{number}" for code in codes]
    return list(dict.fromkeys(flags))


def native_archs() -> str:
    """Those of the GPUs in this machine, as TORCH_CUDA_ARCH_LIST writes them."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"TORCH_CUDA_ARCH_LIST: 'native' needs nvidia-smi to work here: {error}") from error
    return ";".join(sorted(set(printed.split()), key=float)) + "+PTX"


def torch_archs(listed: str) -> str:
    """The architectures in a TORCH_CUDA_ARCH_LIST, as CAPSOPS_CUDA_ARCHS writes them.

    It is often set for other packages, to all that a toolkit knows, so what is too old is left out.
    """
    archs = []
    for word in filter(None, re.split(r"[;,\s]+", listed)):
        for arch in (native_archs() if word == "native" else TORCH_ARCH_NAMES.get(word, word)).split(";"):
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
                raise ValueError(
                    f"TORCH_CUDA_ARCH_LIST: got {word!r} in {listed!r}, takes numbers such as 8.0, 9.0a or"
                    f" 9.0+PTX, native, {', '.join(TORCH_ARCH_NAMES)}"
                )
            archs.append(arch.replace(".", ""))
    new = [arch for arch in dict.fromkeys(archs) if int(re.match(r"\d+", arch)[0]) >= OLDEST_CUDA_ARCH]
    if not new:
        raise NotBuiltError(
            f"TORCH_CUDA_ARCH_LIST is {listed!r}, and the kernels need 8.0 or newer",
            "add a newer one to it, or name one in CAPSOPS_CUDA_ARCHS",
        )
    return ";".join(new)


def default_archs(nvcc: str) -> str:
    """Those of DEFAULT_CUDA_ARCHS that nvcc knows, with PTX of the newest."""
    printed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    known = [arch for arch in DEFAULT_CUDA_ARCHS if f"sm_{arch}" in printed.stdout.split()]
    if not known:
        raise NotBuiltError(
            f"{nvcc} --list-gpu-code names none of {', '.join(DEFAULT_CUDA_ARCHS)}:"
            f" {(printed.stderr or printed.stdout).strip()}",
            FIX_NVCC,
            failed=True,
        )
    return f"{';'.join(known)}+PTX"


def cuda_archs(environ: Mapping[str, str], nvcc: str) -> str:
    """The architectures to compile for."""
    if archs := environ.get("CAPSOPS_CUDA_ARCHS"):
        return archs
    listed = environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    return torch_archs(listed) if listed else default_archs(nvcc)


def cuda_choice(environ: Mapping[str, str]) -> str:
    choice = environ.get("CAPSOPS_BUILD_CUDA") or "auto"
    if choice not in ("0", "1", "auto"):
        raise ValueError(f"CAPSOPS_BUILD_CUDA takes 0, 1 or auto, got {choice!r}")
    return choice


def includes() -> list[str]:
    """Flags for the bindings only: pip makes these paths anew for each build, the kernels stay compiled."""
    return ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]


def cpu_objects(machine: str, environ: Mapping[str, str]) -> Objects:
    """Those of capsops._cpu.

    Where an inline function that was not inlined is in several objects, the linker keeps the first copy: in
    this order that is one which runs on every processor.
    """
    folder, flags = (
        ROOT / "csrc/cpu",
        (*CPU_FLAGS, *shlex.split(environ.get("CXXFLAGS", "")), f"-I{ROOT / 'csrc'}"),
    )
    objects: Objects = {"bindings.o": (folder / "bindings.cpp", (*flags, *includes()))}
    for isa, isa_flags in cpu_isas(machine).items():
        for source in sorted(set(folder.glob("*.cpp")) - {folder / "bindings.cpp"}):
            objects[f"{source.stem}.{isa}.o"] = source, (*flags, f"-DCAPSOPS_ISA={isa}", *isa_flags)
    return objects


def cuda_objects(archs: str) -> Objects:
    """Those of capsops._cuda, all compiled by nvcc, which passes C++ on to the host compiler."""
    flags = (*CUDA_FLAGS, *cuda_arch_flags(archs), f"-I{ROOT / 'csrc'}")
    sources = sorted(path for path in (ROOT / "csrc/cuda").glob("*") if path.suffix in (".cu", ".cpp"))
    objects: Objects = {}
    for source in sources:
        own = [flag for stem, own in CUDA_FLAGS_OF.items() if fnmatch(source.stem, stem) for flag in own]
        headers = includes() if source.stem == "bindings" else ()
        objects[f"{source.name}.o"] = source, (*flags, *own, *headers)
    return objects


def first_error(ninja_output: str, lines: int = 12) -> str:
    """The first lines that the failed command of a ninja run printed, without ninja's own."""
    output = ninja_output.splitlines()
    failed = next((number for number, line in enumerate(output) if line.startswith("FAILED:")), None)
    if failed is None:
        return "\n".join(output[:lines])
    printed = output[failed + 2 :]  # "FAILED: object", the command line, then what the command printed
    said = takewhile(lambda line: not re.match(r"\[\d+/\d+\]|ninja: |FAILED:", line), printed)
    return "\n".join([*said][:lines]) or "the compiler printed nothing"


def make(
    folder: Path, compiler: Sequence[str], objects: Objects, link_flags: Sequence[str], remedy: str
) -> Path:
    """Compiles what changed and links it; `remedy` is what helps where a compiler fails."""

    def quoted(words: Sequence[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "build.ninja").open("w") as file:
        build = Writer(file, width=1000)
        command = f"{quoted(compiler)} $flags"
        build.rule(
            "compile", f"{command} -MMD -MF $out.d -c $in -o $out", "compiling $out", "$out.d", deps="gcc"
        )
        build.rule("link", f"{quoted(compiler)} $in -o $out -shared $flags", "linking $out")
        for name, (source, flags) in reversed(objects.items()):  # the slowest to compile first
            build.build(name, "compile", str(source).replace("$", "$$"), variables={"flags": quoted(flags)})
        build.build("library.so", "link", list(objects), variables={"flags": quoted(link_flags)})
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    command = [str(Path(ninja.BIN_DIR, "ninja")), *jobs]
    output = []
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            sys.stdout.write(line)
            output.append(line)
    if process.returncode != 0:
        raise NotBuiltError(f"compilation failed: {first_error(''.join(output))}", remedy, failed=True)
    return folder / "library.so"


def version(command: Sequence[str], pattern: str) -> str:
    """What a compiler prints of its version, for the record; that is no reason to fail."""
    printed = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    match = re.search(pattern, printed)
    return match[0] if match else "unknown version"


def build_cpu(folder: Path) -> tuple[Path, dict[str, object]]:
    named = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if named is None:
        raise NotBuiltError(
            "no C++ compiler: CXX is not set and there is no c++, g++ or clang++ on the path",
            FIX_COMPILER,
            failed=True,
        )
    compiler, machine = shlex.split(named), platform.machine()
    link_flags = ["-fopenmp", *shlex.split(os.environ.get("LDFLAGS", ""))]
    if sys.platform == "darwin":
        link_flags += ["-undefined", "dynamic_lookup"]
    library = make(folder, compiler, cpu_objects(machine, os.environ), link_flags, FIX_COMPILER)
    isas = {isa: " ".join(flags) for isa, flags in cpu_isas(machine).items()}
    flags = (*CPU_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")))
    return library, {"compiler": version(compiler, ".+"), "flags": " ".join(flags), "isas": isas}


def has_cuda_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def kernels_fingerprint() -> str:
    """Of the sources that are compiled here; loaded by its path, since importing capsops imports torch."""
    spec = importlib.util.spec_from_file_location("fingerprint", ROOT / "capsops/backends/fingerprint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.cuda(ROOT)


def build_cuda(folder: Path) -> tuple[Path, dict[str, object]]:
    choice = cuda_choice(os.environ)
    if choice == "0":
        raise NotBuiltError("CAPSOPS_BUILD_CUDA was 0", "unset CAPSOPS_BUILD_CUDA")
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which("nvcc", path=str(Path(home, "bin")))) or shutil.which("nvcc")
    if nvcc is None:
        raise NotBuiltError(
            "there is no nvcc on the path or in CUDA_HOME", "install the CUDA toolkit and set CUDA_HOME to it"
        )
    if choice == "auto" and not has_cuda_driver():
        raise NotBuiltError(
            "there is no NVIDIA driver here (libcuda.so.1)",
            "install the driver, or set CAPSOPS_BUILD_CUDA=1 to build for another machine",
        )
    archs = cuda_archs(os.environ, nvcc)
    library = make(folder, [nvcc], cuda_objects(archs), ["-cudart", "static"], FIX_NVCC)
    release = version([nvcc], "release .*")
    return library, {
        "compiler": f"nvcc {release}",
        "toolkit": release.removeprefix("release ").partition(",")[0],
        "flags": " ".join(CUDA_FLAGS),
        "archs": archs,
        "fingerprint": kernels_fingerprint(),
    }


def replace(path: Path, content: bytes, mode: int = 0o644) -> None:
    """By way of a new file: a process that has the old one mapped keeps it whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.chmod(mode)
    temporary.replace(path)


class BuildExtensions(build_ext):
    """Runs ninja in build/, puts what it made into the package and records what was not made."""

    def run(self) -> None:
        self.written = ["_build.json"]
        record: dict[str, dict[str, object]] = {}
        package = ROOT / "capsops" if self.inplace else Path(self.build_lib, "capsops")
        package.mkdir(parents=True, exist_ok=True)
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        build = ROOT / "build" / f"native{Path(suffix).stem}"
        for name, make_library in (("cpu", build_cpu), ("cuda", build_cuda)):
            target = package / f"_{name}{suffix}"
            try:
                library, facts = make_library(build / name)
            except NotBuiltError as error:
                if name == "cuda" and cuda_choice(os.environ) == "1":
                    raise SystemExit(
                        f"CAPSOPS_BUILD_CUDA=1: {error.reason}\nTo fix it: {error.remedy}"
                    ) from error
                target.unlink(missing_ok=True)
                record[name] = {"built": False, "reason": error.reason, "remedy": error.remedy}
                if error.failed:
                    print(
                        f"{STARS}\ncapsops._{name} IS NOT BUILT; capsops is installed without it.\n"
                        f"{error.reason}\nTo fix it: {error.remedy}.\n"
                        f"`python -m capsops` says this again.\n{STARS}",
                        file=sys.stderr,
                        flush=True,
                    )
            else:
                replace(target, library.read_bytes(), mode=0o755)
                self.written.append(target.name)
                record[name] = {"built": True, **facts}
        replace(package / "_build.json", f"{json.dumps(record, indent=2)}\n".encode())

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib, "capsops", name)) for name in self.written]

    def get_output_mapping(self) -> dict[str, str]:
        return (
            {output: f"capsops/{Path(output).name}" for output in self.get_outputs()} if self.inplace else {}
        )


if __name__ == "__main__":
    # The extensions are named so that wheels carry the platform's tag; BuildExtensions does the rest.
    names = ("capsops._cpu", "capsops._cuda")
    setup(
        ext_modules=[Extension(name, sources=[], optional=True) for name in names],
        cmdclass={"build_ext": BuildExtensions},
    )
