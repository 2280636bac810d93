"""Runs test_kernels.py under Triton's interpreter, in processes of their own."""

import os
import re

import pytest

from tests.processes import run_python

pytest.importorskip("triton", minversion="3.6", reason="Triton 3.6 or newer is not installed")

FILE = "tests/capsops/triton/test_kernels.py"


def run(selection: str) -> int:
    """How many tests passed."""
    done = run_python(
        "-W",
        "ignore::RuntimeWarning",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "-n",
        str(min(4, os.cpu_count() or 1)),
        "-m",
        selection,
        FILE,
        timeout=3000,
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
    assert "skipped" not in done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-1000:]
    return int(passed[1])


@pytest.mark.timeout(900)
def test_every_kernel_equals_the_reference() -> None:
    assert run("not slow") > 200


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_kernel_in_every_dtype() -> None:
    assert run("slow") > 100
