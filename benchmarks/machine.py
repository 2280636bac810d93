"""Where and of what something was measured: device, versions, commit, command, date."""

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy
import torch

import capsops

ROOT = Path(__file__).resolve().parents[1]


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def isa() -> str:
    """The instruction set that capsops' kernels take here."""
    try:
        from capsops import _cpu
    except ImportError:
        return "none: capsops._cpu is not built"
    return _cpu.isa()


def cpu() -> dict[str, object]:
    return {
        "type": "cpu",
        "model": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
    }


def slug(name: str) -> str:
    """A name as part of a file's: "AMD EPYC 9654" → "amd-epyc-9654"."""
    name = re.sub(r"\((r|tm)\)", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def provenance(command: Sequence[str]) -> dict[str, object]:
    """Everything but the device. Results themselves do not make the tree dirty: they are what is written."""
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!results")
    return {
        "command": shlex.join(command),
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(changed),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "capsops": capsops.__version__,
            "system": f"{platform.system()} {platform.machine()}",
        },
        "interpreter": sys.implementation.name,
    }
