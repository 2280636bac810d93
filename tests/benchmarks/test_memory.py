"""The measurement of memory, on allocations of known size."""

import pytest

from benchmarks import memory
from tests.processes import run_python

MIB = 1 << 20

pytestmark = pytest.mark.skipif(not memory.available(), reason="no resettable high-water mark on this system")

# Memory that was freed before the mark is set must not hide what is allocated after it.
SCRIPT = """
import torch
from benchmarks.memory import HighWater

freed = [torch.ones(1 << 14) for _ in range(1000)]
del freed
mark = HighWater()
kept = []
{body}
print(mark.bytes())
"""

ONE_BLOCK = "x = torch.ones(16 << 20); del x"
SMALL_BLOCKS = "x = [torch.ones(1 << 12) for _ in range(4096)]; del x"
ONE_AFTER_ANOTHER = "for _ in range(8): x = None; x = torch.ones(16 << 20)"
KEPT_AND_FREED = "kept.append(torch.ones(8 << 20)); x = torch.ones(8 << 20); del x"
ON_THE_HEAP = "x = bytearray(b'1') * (64 << 20); del x"


@pytest.mark.parametrize("body", [ONE_BLOCK, SMALL_BLOCKS, ONE_AFTER_ANOTHER, KEPT_AND_FREED, ON_THE_HEAP])
def test_sixty_four_mebibytes_are_seen(body: str) -> None:
    done = run_python("-c", SCRIPT.format(body=body))
    assert done.returncode == 0, done.stderr
    assert abs(int(done.stdout) - 64 * MIB) <= 2 * MIB


def test_nothing_is_seen_where_nothing_is_allocated() -> None:
    mark = memory.HighWater()
    assert mark.bytes() <= MIB


def test_the_einsum_form_stores_its_predictions() -> None:
    """Twice, since it copies them into the layout of the routing."""
    case = memory.Case(16)
    peak = memory.peak_memory("einsum", case, memory.FORWARD)
    assert abs(peak - 2 * 4 * case.predictions) <= MIB


def test_an_unknown_peer_says_so() -> None:
    with pytest.raises(RuntimeError, match="no such form"):
        memory.peak_memory("no such form", memory.Case(1), memory.FORWARD)
