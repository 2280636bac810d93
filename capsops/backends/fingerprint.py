"""Fingerprints of the kernels' sources, which a proof on a GPU is about.

Comments, docstrings, white space, imports and the names of files do not count. This file imports neither
torch nor capsops, so that setup.py can load it by its path.
"""

import ast
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

CUDA_SOURCES = ("csrc/cuda/*", "csrc/common/*")
CUDA_FLAGS = re.compile(r"^CUDA_FLAGS\w* = .*$", re.MULTILINE)  # of nvcc, in setup.py
TRITON_SOURCES = "[!_]*.py"  # __init__.py has no kernel


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


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _hash(codes: Iterable[str], flags: str = "") -> str:
    """16 hexadecimal digits; the order of the codes does not count."""
    parts = sorted(hashlib.sha256(code.encode()).hexdigest() for code in codes)
    return hashlib.sha256("".join([*parts, flags]).encode()).hexdigest()[:16]


def cuda(root: Path) -> str:
    """Of the CUDA kernels' sources in a checkout, with nvcc's flags in its setup.py."""
    paths = [path for pattern in CUDA_SOURCES for path in root.glob(pattern) if path.is_file()]
    flags = "".join(CUDA_FLAGS.findall(_text(root / "setup.py")))
    return _hash((cpp_code(_text(path)) for path in paths), flags)


def triton(folder: Path) -> str:
    """Of the Triton kernels' sources in capsops/backends/triton, in a checkout or as installed."""
    return _hash(python_code(_text(path)) for path in folder.glob(TRITON_SOURCES))
