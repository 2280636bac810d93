"""`python -m capsops info`: what is installed, which backend computes where, and why one does not.

Nothing is checked and no kernel runs: for a GPU on which no kernel is proved yet it says what the first call
will do.
"""

import argparse
import importlib
import json
import platform
import re
from pathlib import Path
from typing import Any

import torch

import capsops
from capsops import dispatch
from capsops.backends import BACKENDS
from capsops.backends.device import Device, driver_cuda
from capsops.backends.extension import build_record
from capsops.command_line import table
from capsops.proofs import order
from capsops.proofs import standing as standings
from capsops.proofs.records import version
from capsops.proofs.standing import LIMIT, Standing


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
        if torch.cuda.is_available() and torch.version.cuda and not module.device_count():
            toolkit = built.get("toolkit", built["compiler"])
            driver = (
                f"the NVIDIA driver supports CUDA {driver_cuda()}, and the kernels were built with {toolkit}"
            )
            rows.append(("", f"{driver}: none of them can run"))
            rows.append(("", "to fix it: update the driver, or build with an older toolkit (CUDA_HOME)"))
    return rows


def automatic(device: str) -> str:
    """What impl="auto" takes on a device, or why it takes nothing there."""
    try:
        if dispatch.requested("auto", device) == "auto" and device == "cuda":
            return "torch sees no GPU"
        return dispatch.automatic(device)
    except (RuntimeError, ValueError) as error:
        return f"nothing: {str(error).splitlines()[0]}"


def on_gpu(device: Device) -> list[tuple[str, str]]:
    """What impl="auto" does on a GPU, backend by backend in their order, without checking anything."""
    rows = [(f"cuda:{device.number}", f"{device.model}, driver {device.driver}, {memory(device.memory)}")]
    first = True
    for backend in (BACKENDS[name] for name in order.ORDER if BACKENDS[name].needs_proof):
        standing = standings.known(backend, device)
        rows.append(("", f"{backend.name}: {said(standing, device, first)}"))
        first = first and not (standing is None or standing.scope.calls)
    rows.append(("", "reference: plain PyTorch, for float64 and for all that no proof covers"))
    return rows


def memory(size: int) -> str:
    return f"{size / 2**30:.0f} GiB"


def said(standing: Standing | None, device: Device, first: bool) -> str:
    """A sentence on what is proved, or what the first call will do."""
    if standing is None:
        if reason := standings.why_no_check(device):
            return f"not proved, and the first call will not check it: {reason}"
        when = "the first call" if first else "the first call that the kernels above do not serve"
        return (
            f"not proved here yet: {when} checks it in a process of its own, at most {LIMIT:.0f} s, and is"
            " served by it if all was right; `python -m capsops check` does so now"
        )
    if not standing.scope.calls:
        return f"not used: {standing.why_not}"
    options = sorted({option for _, _, option in standing.scope.calls if option})
    limit = standing.scope.longest
    limits = f", D up to {limit[0]} and K up to {limit[1]}" if limit else ""
    without = "" if options else ", without options of routing"
    wrong = f"; {standing.why_not}" if standing.why_not else ""
    return f"{standing.proof}{without}{limits}{wrong}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Prints the report; 0."""
    print(json.dumps(report(), indent=1, ensure_ascii=False) if args.json else text())
    return 0


def report() -> dict[str, Any]:
    """What the text says, for programs."""
    gpus = [dispatch.device_facts(torch.device("cuda", n)) for n in range(torch.cuda.device_count())]
    return {
        "capsops": capsops.__version__,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("torch", "triton", "numpy")},
        "build": build_record(),
        "backends": [service._asdict() for service in dispatch.describe()],
        "auto": {
            "cpu": automatic("cpu"),
            **{gpu.torch_name: [line for _, line in on_gpu(gpu)] for gpu in gpus},
        },
    }


def text() -> str:
    """The report to read."""
    record = build_record()
    parts = [
        f"capsops {capsops.__version__}\n",
        table(
            [("python", platform.python_version()), *((p, version(p)) for p in ("torch", "triton", "numpy"))]
        ),
        "\nextensions",
        table(row for name in ("cpu", "cuda") for row in extension(name, record)),
        "\nbackends",
    ]
    services = (
        (s.impl, s.device, "available" if s.available else s.reason.splitlines()[0])
        for s in dispatch.describe()
    )
    parts.append(table([("impl", "tensors on", ""), *services]))
    asked = dispatch.asked("auto")
    parts.append('\nimpl="auto" takes' + (f", because CAPSOPS_IMPL is {asked}" if asked != "auto" else ""))
    gpus = range(torch.cuda.device_count() if asked == "auto" else 0)
    rows = [row for n in gpus for row in on_gpu(dispatch.device_facts(torch.device("cuda", n)))]
    parts.append(table([("cpu", automatic("cpu")), *(rows or [("cuda", automatic("cuda"))])]))
    return "\n".join(parts)
