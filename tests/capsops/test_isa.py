"""Every instruction set that the kernels are compiled for and this machine has, against the reference.

The one that this process has chosen, the best unless a variable forces another, is what the files named below
test when they run by themselves.
"""

import re

import pytest

from tests.processes import run_python
from tests.tiers import fast_only

_cpu = pytest.importorskip("capsops._cpu", reason="the C++ extension is not built")

ISAS = [isa for isa in _cpu.isas() if isa != _cpu.isa()]
# How many tests of each file are chosen, at least.
FILES = {
    "squash": 190,
    "predictions": 90,
    "dynamic_routing": 300,
    "capsule_routing": 400,
    "couplings": 160,
    "threads": 3,
}


def test_the_best_one_is_chosen() -> None:
    """isas() goes from slow to fast. The variable that forces one may be set for this very run."""
    done = run_python("-c", "from capsops import _cpu; print(_cpu.isa())", CAPSOPS_CPU_ISA="")
    assert done.stdout.strip() == _cpu.isas()[-1], done.stderr
    assert _cpu.isas()[0] == "baseline"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", fast_only(["squash", "capsule_routing"], FILES))
def test_equivalence(name: str, isa: str) -> None:
    """The tests of hand-computed cases, equality with the reference, precision and non-finite numbers."""
    code = (
        "import sys, pytest; from capsops import _cpu;"
        f"assert _cpu.isa() == {isa!r}, _cpu.isa();"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    chosen = "by_hand or equals_the_reference or low_precision or finite or large or tiny or layout"
    chosen = f"cpu and ({chosen} or several_python_threads or (rounding_only and (i301 or t0)))"
    file = f"tests/capsops/test_{name}.py"
    done = run_python("-c", code, "-p", "no:cacheprovider", "-k", chosen, file, CAPSOPS_CPU_ISA=isa)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-1000:]
    assert int(passed[1]) >= FILES[name]
    assert "skipped" not in done.stdout


def test_unknown_name() -> None:
    done = run_python("-c", "import capsops._cpu", CAPSOPS_CPU_ISA="mmx")
    assert done.returncode != 0
    assert "CAPSOPS_CPU_ISA" in done.stderr
    assert "mmx" in done.stderr
    assert "baseline" in done.stderr
