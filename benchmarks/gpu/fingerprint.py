"""Fingerprints of the kernels' sources, which a proof on a GPU is about.

python -m benchmarks.gpu.fingerprint                    that of each set of kernels
python -m benchmarks.gpu.fingerprint --same OLD NEW     whether two builds have the same machine code

Comments, docstrings, white space, imports and the names of files do not count. Where sources change but the
machine code stays the same, instruction for instruction, the proof holds for the new fingerprint too.
"""

import argparse
import ast
import hashlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CUDA_SOURCES = ("csrc/cuda/*", "csrc/common/*")
CUDA_FLAGS = re.compile(r"^CUDA_FLAGS = .*$", re.MULTILINE)  # of nvcc, in setup.py
TRITON_SOURCES = ("capsops/backends/triton/[!_]*.py",)  # __init__.py has no kernel


def cpp_code(text: str) -> str:
    """C++ without comments and white space."""
    comment_or_string = re.compile(r'//[^\n]*|/\*.*?\*/|("(?:\\.|[^"\\])*")', re.DOTALL)
    return re.sub(r"\s+", "", comment_or_string.sub(lambda match: match.group(1) or " ", text))


def python_code(text: str) -> str:
    """The syntax tree of Python code without docstrings and imports, the same in every version of Python."""

    def of(node: object) -> str:
        if isinstance(node, list):
            return (
                "[" + ",".join(of(x) for x in node if not isinstance(x, (ast.Import, ast.ImportFrom))) + "]"
            )
        if not isinstance(node, ast.AST):
            return repr(node)
        if (
            isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:]
        fields = [f"{name}={of(value)}" for name, value in ast.iter_fields(node) if value not in (None, [])]
        return f"{type(node).__name__}({','.join(fields)})"

    return of(ast.parse(text))


def fingerprint(impl: str) -> str:
    """Of the sources of "cuda", with nvcc's flags, or of "triton"; 16 hexadecimal digits."""
    patterns, code = (CUDA_SOURCES, cpp_code) if impl == "cuda" else (TRITON_SOURCES, python_code)
    paths = [path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()]
    flags = "".join(CUDA_FLAGS.findall((ROOT / "setup.py").read_text())) if impl == "cuda" else ""
    parts = sorted(hashlib.sha256(code(path.read_text()).encode()).hexdigest() for path in paths)
    return hashlib.sha256("".join([*parts, flags]).encode()).hexdigest()[:16]


def machine_code(library: Path) -> Counter[str]:
    """The instructions of each kernel for each architecture, without the kernels' names."""
    command = ["cuobjdump", "-sass", library]  # of the CUDA toolkit; Triton carries it too
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels: Counter[str] = Counter()
    for arch in re.split(r"\narch = ", printed)[1:]:
        for kernel in re.split(r"\n\s*Function : ", arch)[1:]:
            instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", kernel)
            kernels[arch.split()[0] + "\n" + "\n".join(instructions)] += 1
    return kernels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--same", nargs=2, type=Path, metavar=("OLD", "NEW"))
    args = parser.parse_args()
    if args.same is None:
        for impl in ("cuda", "triton"):
            print(impl, fingerprint(impl))
        return
    old, new = map(machine_code, args.same)
    print(f"{old.total()} and {new.total()} kernels, {(old & new).total()} of them the same")
    sys.exit(old != new)


if __name__ == "__main__":
    main()
