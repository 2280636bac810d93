"""Runs Python code in a process of its own, with the project importable and an environment of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_python(*args: str, timeout: float = 280, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python *args` in the project's root; what it prints is text."""
    return subprocess.run(
        [sys.executable, *args],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
