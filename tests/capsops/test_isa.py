"""The kernels of every instruction set that this machine supports, against the reference.

The set that this process uses is left out (the best one, unless CAPSOPS_CPU_ISA names another): the files
below test it when they run by themselves.
"""

import re

import pytest

from tests.processes import run_python
from tests.tiers import fast_only

_cpu = pytest.importorskip("capsops._cpu", reason="the C++ extension is not built")

ISAS = [isa for isa in _cpu.isas() if isa != _cpu.isa()]
# The least number of tests that the expression below selects in each file.
FILES = {
    "squash": 190,
    "predictions": 90,
    "dynamic_routing": 300,
    "capsule_routing": 400,
    "couplings": 160,
    "threads": 3,
}


def test_the_best_instruction_set_is_the_default() -> None:
    """isas() lists them from slow to fast. CAPSOPS_CPU_ISA is cleared, as it may be set for this run."""
    done = run_python("-c", "from capsops import _cpu; print(_cpu.isa())", CAPSOPS_CPU_ISA="")
    assert done.stdout.strip() == _cpu.isas()[-1], done.stderr
    assert _cpu.isas()[0] == "baseline"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", fast_only(["squash", "capsule_routing"], FILES))
def test_every_instruction_set(name: str, isa: str) -> None:
    """Runs the tests by hand, those against the reference, and those of precision and non-finite values."""
    code = (
        "import sys, pytest; from capsops import _cpu;"
        f"assert _cpu.isa() == {isa!r}, _cpu.isa();"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    selection = "by_hand or equals_the_reference or low_precision or finite or large or tiny or layout"
    selection = f"cpu and ({selection} or several_python_threads or (rounding_only and (i301 or t0)))"
    file = f"tests/capsops/test_{name}.py"
    done = run_python("-c", code, "-p", "no:cacheprovider", "-k", selection, file, CAPSOPS_CPU_ISA=isa)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-1000:]
    assert int(passed[1]) >= FILES[name]
    assert "skipped" not in done.stdout


def test_an_unknown_instruction_set_is_an_error() -> None:
    done = run_python("-c", "import capsops._cpu", CAPSOPS_CPU_ISA="mmx")
    assert done.returncode != 0
    assert "CAPSOPS_CPU_ISA" in done.stderr
    assert "mmx" in done.stderr
    assert "baseline" in done.stderr
