"""The choice of blocks, as far as Triton's interpreter can try it."""

import json

import pytest

from tests.processes import run_python

pytest.importorskip("triton", minversion="3.6", reason="Triton 3.6 or newer is not installed")

SCRIPT = """
import json
from benchmarks import triton_tiles
from capsops.measuring.cases import Case

def time(call):
    call()
    return [0.002]

def fails(call):
    raise RuntimeError("out of resources\\nand more")

case, entries = Case(3, 5, 3, 4, 8), triton_tiles.candidates(3)[:1]
print(json.dumps([triton_tiles.measure(case, entries, "cpu", clock)[0] for clock in (time, fails)]))
"""


@pytest.mark.slow
def test_blocks_are_timed_and_failures_are_listed() -> None:
    done = run_python("-c", SCRIPT, fresh=True, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    timed, failed = json.loads(done.stdout)
    assert timed["forward"] == timed["backward"] == 2
    assert failed["forward"] == float("inf")
    assert failed["backward failed"] == "out of resources"
