"""The compiled extensions: what the build recorded of them, and how tensors are passed to them."""

import hashlib
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor


def build_record() -> dict[str, dict[str, Any]]:
    """What the build recorded of each extension; empty where there is no record.

    A record that cannot be read is reported as a build that failed.
    """
    path = Path(__file__).parents[1] / "_build.json"
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
        return {name: {**facts, "built": facts["built"]} for name, facts in record.items()}  # checks them
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = f"the build record {path.name} cannot be read ({type(error).__name__}: {error})"
        failed = {"built": False, "reason": reason, "remedy": "install capsops again"}
        return {"cpu": failed, "cuda": failed}


def why_not_built(name: str) -> str:
    """Why there is no capsops._<name>, as far as the build recorded it."""
    record = build_record()
    if not record:
        return "the extension was not built (no build record); run: pip install -e ."
    facts = record.get(name, {})
    if "reason" not in facts:
        return "its build succeeded; install capsops again"
    return f"{facts['reason']} (to fix it: {facts.get('remedy', 'install capsops again')})"


def load(name: str) -> tuple[ModuleType | None, str]:
    """The module capsops._<name>, or None and the reason why it cannot be imported."""
    try:
        return importlib.import_module(f"capsops._{name}"), ""
    except ImportError as error:
        return None, f"capsops._{name} cannot be imported ({error}): {why_not_built(name)}"


def hash_of(*paths: Path) -> str:
    """A hash of the files' contents, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def code_hash(module: ModuleType, backend: str) -> str:
    """A hash of an extension and of the Python that calls it, the file `backend`."""
    assert module.__file__ is not None
    return hash_of(Path(module.__file__), Path(backend), Path(__file__))


def memory(x: Tensor | None) -> tuple[int, int]:
    """Address and length in bytes of a contiguous tensor, as the extensions take it."""
    return (0, 0) if x is None else (x.data_ptr(), x.nbytes)


def vectors(s: Tensor, dim: int) -> tuple[int, int, int]:
    """The shape [outer, n, inner] of a tensor whose vectors of n numbers lie along `dim`."""
    outer = inner = 1
    for size in s.shape[:dim]:
        outer *= size
    for size in s.shape[dim + 1 :]:
        inner *= size
    return outer, s.shape[dim], inner


def routing_options(
    logits: Tensor | None, mask: Tensor | None, shared: bool, grad_logits: Tensor | None = None
) -> tuple | None:
    """The options that most calls of routing do without, as the extensions take them; None for none."""
    if logits is None:
        if mask is None and not shared:
            return None
        return shared, memory(mask), (0, 0), (1, 1, 1), (0, 0, 0), (0, 0)
    # From the first number to the end of the storage: the extension checks that the strides stay within it.
    end = logits.untyped_storage().nbytes() - logits.storage_offset() * logits.element_size()
    begin = logits.data_ptr(), end
    return shared, memory(mask), begin, tuple(logits.shape), logits.stride(), memory(grad_logits)
