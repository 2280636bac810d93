"""Runs test_kernels.py under Triton's interpreter, in separate processes."""

import os
import re

import numpy
import pytest

from tests.processes import run_python

triton = pytest.importorskip("triton", minversion="3.6", reason="Triton 3.6 or newer is not installed")

from capsops.backends.triton import why_interpreter_fails  # noqa: E402

FILE = "tests/capsops/triton/test_kernels.py"


def run(selection: str, processes: int, file: str = FILE, names: str = "") -> int:
    """Runs the selected tests and returns how many passed; `names` as in pytest's -k."""
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
        str(processes),
        "-m",
        selection,
        "-k",
        names,
        file,
        timeout=3000,
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
    assert "skipped" not in done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-1000:]
    return int(passed[1])


FAILURE = why_interpreter_fails(triton.__version__, numpy.__version__)
needs_interpreter = pytest.mark.skipif(bool(FAILURE), reason=FAILURE)


@pytest.mark.parametrize(
    ("triton", "numpy", "fails"),
    [
        ("3.6.0", "2.4.0", True),
        ("3.6.0", "2.10.1", True),
        ("3.6.0", "2.3.5", False),
        ("3.6.0", "1.26.4", False),
        ("3.7.1", "2.4.0", False),
        ("3.10.0", "2.4.0", False),
    ],
)
def test_versions_with_which_the_interpreter_fails(triton: str, numpy: str, fails: bool) -> None:
    why = why_interpreter_fails(triton, numpy)
    assert bool(why) == fails
    if fails:
        assert f"Triton {triton} " in why
        assert f"got {numpy};" in why


def test_the_error_of_a_call_explains_why_the_interpreter_fails() -> None:
    code = (
        "import numpy, torch, triton\n"
        "triton.__version__, numpy.__version__ = '3.6.0', '2.4.0'\n"
        "import capsops\n"
        "try: capsops.squash(torch.ones(3), impl='triton')\n"
        "except RuntimeError as error: print(error)"
    )
    done = run_python("-c", code, TRITON_INTERPRET="1")
    message = "impl='triton' is not available: the interpreter of Triton 3.6.0 fails with NumPy 2.4"
    assert done.stdout.startswith(message), done.stderr


@needs_interpreter
@pytest.mark.timeout(900)
def test_every_kernel_equals_the_reference() -> None:
    assert run("not slow", 0) > 200  # each further process would import everything again


@needs_interpreter
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_kernel_in_every_dtype() -> None:
    assert run("slow", min(4, os.cpu_count() or 1)) > 100


@needs_interpreter
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_routing_option_in_low_precision() -> None:
    file = "tests/capsops/test_routing_options.py"
    assert run("not slow", min(4, os.cpu_count() or 1), file, "triton and low_precision") > 40
