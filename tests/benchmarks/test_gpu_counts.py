"""The counts of the CUDA kernels, compiled here, beside what was estimated and measured before."""

import pytest

from benchmarks import gpu_counts
from benchmarks.gpu import counts, flow, launches, objects
from benchmarks.gpu.count_limits import broken
from benchmarks.gpu.launches import BACKWARD, FORWARD

pytestmark = [
    pytest.mark.skipif(objects.nvcc() is None, reason="there is no nvcc on the path or in CUDA_HOME"),
    pytest.mark.xdist_group("gpu_counts"),  # one compiles, the others reuse it
]

# Cycles of the gradients on an H200 (results/gpu-nvidia-h200/1-counters.txt).
MEASURED_GRADIENTS = {"tf32": 198_380, "bfloat16": 167_826, "float32": 420_586}


@pytest.fixture(scope="module")
def forward() -> list[gpu_counts.Row]:
    return gpu_counts.count_call(FORWARD, "tf32")


def test_the_launches_are_those_of_the_plan() -> None:
    steps = launches.recorded(FORWARD, "tf32", gpu_counts.CASE)
    assert len(steps) == 7  # the operands; of each pass, the sums and what follows them
    assert {(step.blocks, step.threads, step.cluster) for step in steps} == {(128, 256, 8)}
    assert len(launches.recorded(FORWARD, "tf32", gpu_counts.CASE, cooperative=True)) == 1


def test_a_walk_takes_the_way_of_a_later_pass(forward: list[gpu_counts.Row]) -> None:
    later = next(row for row in forward if row.count.role == counts.LATER)
    # In each of 8 warps, of 9 input capsules: the products of 20 tiles, and of 12 of them once more.
    assert later.count.inner_instructions["HMMA"] == 8 * 9 * (20 + 12)
    assert later.count.inner_instructions["MUFU"] >= 8 * 9 * 8


def test_no_limit_is_broken(forward: list[gpu_counts.Row]) -> None:
    assert not [x for row in forward for x in broken("tf32", row.count, gpu_counts.per_unit(row))]


def test_partial_sums(forward: list[gpu_counts.Row]) -> None:
    """At most 1/8 of what the passes wrote before the blocks of a cluster added up their sums."""
    later = next(row.count for row in forward if row.count.role == counts.LATER)
    assert later.stored_bytes <= 33 * 128 * 160 * 4 / 8


def test_no_kernel_spills() -> None:
    assert not [
        name for name, (function, _) in launches.kernels("tf32").items() if gpu_counts.sass.spills(function)
    ]


def test_loops_of_subroutines_are_there_too() -> None:
    kernels = launches.kernels("tf32")
    name = next(name for name in kernels if "begin_backward_kernel" in name)
    assert flow.Flow(kernels[name][0]).loops


@pytest.mark.slow
@pytest.mark.parametrize("precision", MEASURED_GRADIENTS)
def test_gradients_take_as_long_as_was_measured(precision: str) -> None:
    rows = gpu_counts.count_call(BACKWARD, precision)
    gradients = next(row.count for row in rows if row.count.role == counts.GRADIENTS)
    assert gradients.cycles == pytest.approx(MEASURED_GRADIENTS[precision], rel=0.12)
