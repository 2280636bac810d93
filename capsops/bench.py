"""`python -m capsops bench`: routing at the paper's size on this machine, beside plain PyTorch.

Every result is compared with the reference in float64 before it is timed; then all take turns, so that what
disturbs the machine disturbs all of them. Plain PyTorch is written in several forms
(capsops/measuring/peers.py). A row shows the fastest of them eager, and the fastest under torch.compile of
those that there is time to compile.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import torch

import capsops
from capsops import dispatch
from capsops.backends.device import cpu_model
from capsops.command_line import device_named
from capsops.measuring.bench_report import report
from capsops.measuring.cases import Case
from capsops.measuring.ceiling import measured_ceiling
from capsops.measuring.floor import measured_ceilings
from capsops.measuring.headline import (
    BF16,
    TF32,
    Bench,
    Budget,
    WrongResultError,
    backend_of,
    measure,
    progress,
)
from capsops.measuring.passes import BOTH
from capsops.measuring.precisions import PRECISIONS, matrix_precision

LAYER, BATCHES = Case(1), (128, 16, 1)  # the paper's
MODES = {"cpu": ("float32",), "cuda": (TF32, BF16)}
SECONDS = 90  # beyond which nothing is begun that can be left out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--device",
        type=device_named,
        metavar="DEVICE",
        help="cpu, cuda or cuda:N (default: the current GPU, else the CPU)",
    )
    parser.add_argument(
        "--backend",
        default="auto",
        metavar="NAME",
        help=f"one of {', '.join(dispatch.IMPLS)} (default: auto)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="without torch.compile, which takes most of the two minutes"
    )


def triton_version() -> str | None:
    """None where Triton cannot be imported."""
    try:
        return importlib.import_module("triton").__version__
    except Exception:  # a Triton that does not fit its torch raises others than ImportError
        return None


def header(device: torch.device, backend: str, layer: Case) -> dict[str, Any]:
    """What is measured, and where; measures the ceilings."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = f"sm_{properties.major}{properties.minor}"
        described: dict[str, object] = {
            "type": "cuda",
            "model": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "isa": properties.gcnArchName if torch.version.hip else capability,
        }
        ceilings, how = measured_ceilings(device), "copies and matrix products of torch"
    else:
        flops, how, isa = measured_ceiling()
        ceilings = {"float32": flops}
        described = {
            "type": "cpu",
            "model": cpu_model(),
            "threads": torch.get_num_threads(),
            "isa": isa,
        }
    return {
        "op": layer.op,
        "layer": dict(zip("IJDK", layer.sizes[1:], strict=True)) | {"T": layer.iterations},
        "impl": backend,
        "precisions": MODES[device.type],
        "device": described,
        "ceilings": ceilings,
        "how": how,
        "versions": {
            "capsops": capsops.__version__,
            "torch": torch.__version__,
            "triton": triton_version(),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def conditions(bench: Bench, load: float, served: Collection[str]) -> list[str]:
    """Notes on what makes this run less than it could be."""
    cores, cuda = os.cpu_count() or 1, bench.device.type == "cuda"
    notes = {
        f"the machine was busy, with a load of {load:.1f} on {cores} cores": load > cores / 2,
        "torch.compile: left out by --quick": not bench.compiles,
        "no graph replay, which needs Triton: it cannot be imported": cuda and not bench.replays,
        "impl=auto takes plain PyTorch here, `python -m capsops` says why": (
            cuda and bench.backend == "auto" and "reference" in served
        ),
    }
    return [note for note, applies in notes.items() if applies]


def measure_all(bench: Bench, cases: Sequence[tuple[Case, str]]) -> None:
    """The rows of all cases; after the first ones, of those that there is time for."""
    for case, passes in cases:
        if bench.rows and bench.budget.over():
            bench.leave_out("the rest", f"{case}, {passes}")
        else:
            with matrix_precision(PRECISIONS[case.precision][1]):
                measure(bench, case, passes)
        bench.budget.cases -= 1
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def measure_ceiling_again(bench: Bench, ceilings: dict[str, float]) -> None:
    """The larger of two measurements on a CPU, before and after the rows: other programs lower it."""
    measured_ceiling.cache_clear()
    before, after = ceilings["float32"], measured_ceiling().flops
    if after > before:
        ceilings["float32"] = after
        bench.rows = [replace(row, share=row.share * before / after) for row in bench.rows]


def run(args: argparse.Namespace, layer: Case = LAYER, batches: Sequence[int] = BATCHES) -> int:
    """Measures and prints; 1 where a result is wrong, 2 where the backend cannot compute it, else 0."""
    device, began = args.device, time.monotonic()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if device is None:
        device = device_named("cuda" if torch.cuda.is_available() else "cpu")
    cases = [
        (replace(layer, batch=batch, precision=precision), passes)
        for batch in batches
        for precision in MODES[device.type]
        for passes in BOTH
    ]
    try:
        dispatch.requested(args.backend, device.type)
        served = {backend_of(case, args.backend, device) for case, _ in cases}
    except (RuntimeError, ValueError) as error:
        progress(f"error: --backend {args.backend}: {error}")
        return 2
    try:
        # What a compiler prints is not part of the result.
        with redirect_stdout(sys.stderr), torch.cuda.device(device if device.type == "cuda" else -1):
            budget = Budget(SECONDS, len(cases))
            progress("measuring the ceilings")
            facts = header(device, args.backend, layer)
            replays = device.type == "cuda" and facts["versions"]["triton"] is not None
            bench = Bench(device, args.backend, not args.quick, replays, facts["ceilings"], budget)
            bench.notes += conditions(bench, load, served)
            measure_all(bench, cases)
            if device.type == "cpu":
                measure_ceiling_again(bench, facts["ceilings"])
    except WrongResultError as error:
        progress(f"error: {error}")
        return 1
    notes = bench.all_notes(len(cases))
    if args.json:
        rows = [row.as_json() for row in bench.rows]
        result = {**facts, "rows": rows, "notes": notes, "seconds": time.monotonic() - began}
        print(json.dumps(result, indent=1, ensure_ascii=False))
    else:
        print(report(facts, bench.rows, notes))
    return 0
