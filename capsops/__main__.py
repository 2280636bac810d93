"""`python -m capsops`: what is installed, which backend computes where, and why one is not available."""

import importlib
import importlib.metadata
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import capsops
from capsops import dispatch
from capsops.backends.extension import build_record


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def table(rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(f"  {line}" for line in lines)


def openmp_runtimes(maps: str) -> list[str]:
    """The OpenMP libraries among the files that a process has mapped, from /proc/<pid>/maps."""
    paths = (line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split(maxsplit=5)) == 6)
    return sorted({path for path in paths if re.match(r"lib(gomp|i?omp5?)[-.]", Path(path).name)})


def openmp() -> str:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return "unknown: this system has no /proc/self/maps"
    runtimes = openmp_runtimes(maps.read_text())
    if len(runtimes) == 1:
        return f"{runtimes[0]}, shared with torch"
    return f"{len(runtimes)} runtimes in one process, whose threads may compete: {', '.join(runtimes)}"


def extension(name: str, record: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Rows about capsops._<name>: what the build recorded, and what the loaded extension reports."""
    title = f"capsops._{name}"
    built = record.get(name, {"built": False, "reason": "never built here", "remedy": "pip install -e ."})
    if not built["built"]:
        lines = [
            *f"not built: {built['reason']}".splitlines(),
            f"to fix it: {built.get('remedy', 'install capsops again')}",
        ]
        return [(title, lines[0]), *(("", line) for line in lines[1:])]
    rows = [(title, f"built by {built['compiler']}")]
    try:
        module = importlib.import_module(title)
    except ImportError as error:
        return [
            *rows,
            ("", f"cannot be loaded: {error}"),
            ("", "to fix it: install capsops again, unless that says otherwise"),
        ]
    if name == "cpu":
        rows.append(("", f"instruction set: {module.isa()}, of {', '.join(built['isas'])}"))
        rows.append(("", f"threads: {torch.get_num_threads()}"))
        rows.append(("", f"OpenMP: {openmp()}"))
    else:
        rows.append(("", f"architectures: {built['archs']}"))
    return rows


def automatic(device: str) -> str:
    """What impl="auto" takes on a device, or why it takes nothing there."""
    try:
        if dispatch.requested("auto", device) == "auto" and device == "cuda":
            return "what is proved on the GPU in use; torch sees no GPU"
        return dispatch.automatic(device)
    except (RuntimeError, ValueError) as error:
        return f"nothing: {str(error).splitlines()[0]}"


def on_gpu(index: int) -> list[tuple[str, str]]:
    """What impl="auto" takes on a GPU, and why it does not take what comes before in the order."""
    model, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    chosen = dispatch.chosen("capsule_routing", "auto", torch.device("cuda", index), torch.float32)
    rows = [(f"cuda:{index}", f"{chosen.name}, on {model}")]
    for backend in reversed(dispatch.BACKENDS.values()):
        if backend is chosen:
            break
        if backend.needs_proof:
            reason = dispatch.why_not_proved(backend, model, capability)
            rows.append(("", f"not {backend.name}: {reason.splitlines()[0]}"))
    return rows


def main() -> None:
    record = build_record()
    print(f"capsops {capsops.__version__}\n")
    print(
        table(
            [("python", platform.python_version()), *((p, version(p)) for p in ("torch", "triton", "numpy"))]
        )
    )
    print("\nextensions")
    print(table(row for name in ("cpu", "cuda") for row in extension(name, record)))
    print("\nbackends")
    services = (
        (s.impl, s.device, "available" if s.available else s.reason.splitlines()[0])
        for s in dispatch.describe()
    )
    print(table([("impl", "tensors on", ""), *services]))
    asked = dispatch.asked("auto")
    print('\nimpl="auto" takes' + (f", because CAPSOPS_IMPL is {asked}" if asked != "auto" else ""))
    gpus = range(torch.cuda.device_count() if asked == "auto" else 0)
    rows = [row for index in gpus for row in on_gpu(index)]
    print(table([("cpu", automatic("cpu")), *(rows or [("cuda", automatic("cuda"))])]))


if __name__ == "__main__":
    main()
