"""Every instruction set that the kernels are compiled for and this machine has, against the reference.

The one that this process has chosen, the best unless a variable forces another, is what the files named below
test when they run by themselves.
"""

import re

import pytest

from tests.processes import run_python

_cpu = pytest.importorskip("capsops._cpu", reason="the C++ extension is not built")

HERE = "tests/capsops"
FILES = [
    f"{HERE}/test_{name}.py"
    for name in ("squash", "predictions", "dynamic_routing", "capsule_routing", "couplings", "threads")
]


def test_the_best_one_is_chosen() -> None:
    """isas() goes from slow to fast. The variable that forces one may be set for this very run."""
    done = run_python("-c", "from capsops import _cpu; print(_cpu.isa())", CAPSOPS_CPU_ISA="")
    assert done.stdout.strip() == _cpu.isas()[-1], done.stderr
    assert _cpu.isas()[0] == "baseline"


@pytest.mark.parametrize("isa", [isa for isa in _cpu.isas() if isa != _cpu.isa()])
def test_equivalence(isa: str) -> None:
    """The tests of hand-computed cases, equality with the reference, precision and non-finite numbers."""
    code = (
        "import sys, pytest; from capsops import _cpu;"
        f"assert _cpu.isa() == {isa!r}, _cpu.isa();"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    chosen = "by_hand or equals_the_reference or low_precision or finite or large or tiny or layout"
    chosen = f"cpu and ({chosen} or several_python_threads or (rounding_only and (i301 or t0)))"
    done = run_python("-c", code, "-p", "no:cacheprovider", "-k", chosen, *FILES, CAPSOPS_CPU_ISA=isa)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-1000:]
    assert int(passed[1]) > 500
    assert "skipped" not in done.stdout
    assert all(f"{file} ." in done.stdout for file in FILES), done.stdout[-4000:]


def test_unknown_name() -> None:
    done = run_python("-c", "import capsops._cpu", CAPSOPS_CPU_ISA="mmx")
    assert done.returncode != 0
    assert "CAPSOPS_CPU_ISA" in done.stderr
    assert "mmx" in done.stderr
    assert "baseline" in done.stderr
