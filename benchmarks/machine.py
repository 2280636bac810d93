"""What was measured, and where: device, versions, commit, command, date."""

import os
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy
import torch

import capsops
from capsops.backends.device import cpu_model
from capsops.measuring.ceiling import measured_ceiling

ROOT = Path(__file__).resolve().parents[1]
LOAD_BEFORE = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


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
    """Everything but the device. Changed results do not make the tree dirty: they are what is written."""
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
    }


def header(command: Sequence[str]) -> dict[str, object]:
    """The head of a file of results that were measured on the CPU."""
    ceiling = measured_ceiling()
    device = {
        "type": "cpu",
        "model": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": ceiling.isa,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "load_before": LOAD_BEFORE,
    }
    return {**provenance(command), "device": device, "ceiling": ceiling._asdict()}
