"""The counts of the CUDA kernels, compiled here, beside what was estimated and measured before."""

import pytest

from benchmarks import gpu_counts
from benchmarks.gpu import counts, flow, launches, objects, predictions
from benchmarks.gpu.count_limits import broken
from benchmarks.gpu.launches import BACKWARD, FORWARD

pytestmark = [
    pytest.mark.skipif(objects.nvcc() is None, reason="there is no nvcc on the path or in CUDA_HOME"),
    pytest.mark.xdist_group("gpu_counts"),  # one compiles, the others reuse it
]

# Cycles in which a multiprocessor was active on an H200 (results/gpu-nvidia-h200/1-counters.txt), of the
# cooperative launch of all steps.
MEASURED = {
    (FORWARD, "tf32"): 245_032,
    (BACKWARD, "tf32"): 212_125,
    (FORWARD, "bfloat16"): 202_854,
    (BACKWARD, "bfloat16"): 191_552,
    (FORWARD, "float32"): 339_851,
    (BACKWARD, "float32"): 294_834,
}
MEASURED_GRADIENTS = {"tf32": 198_380, "bfloat16": 167_826, "float32": 420_586}
GIGAHERTZ = 1.82  # the clock of those measurements


@pytest.fixture(scope="module")
def forward() -> list[gpu_counts.Row]:
    return gpu_counts.count_call(FORWARD, "tf32")


def passes_cycles(rows: list[gpu_counts.Row]) -> float:
    """Of all steps but the gradients, with the barriers of the grid between them."""
    steps = [row for row in rows if "passes_kernel" in row.count.kernel]
    barriers = sum(row.times for row in steps) - 1
    return (
        sum(row.times * row.count.cycles for row in steps)
        + barriers * predictions.GRID_BARRIER * GIGAHERTZ * 1e3
    )


def test_the_launches_are_those_of_the_plan() -> None:
    steps = launches.recorded(FORWARD, "tf32", gpu_counts.CASE)
    assert len(steps) == 6  # of each pass, the sums and what follows them
    assert {(step.blocks, step.threads, step.shared) for step in steps} == {(132, 320, 106_624)}
    assert len(launches.recorded(FORWARD, "tf32", gpu_counts.CASE, cooperative=True)) == 1


def test_the_estimate_of_a_later_pass_straight_through_its_code(forward: list[gpu_counts.Row]) -> None:
    later = next(row.count for row in forward if row.count.role == counts.LATER)
    assert later.straight_line_cycles == pytest.approx(1884, rel=0.02)


def test_a_walk_takes_the_way_of_a_later_pass(forward: list[gpu_counts.Row]) -> None:
    later = next(row for row in forward if row.count.role == counts.LATER)
    # Two products of 2 x 2 tiles for 10 output capsules, of 35 input capsules of a block; 10 exponentials
    # of 32 samples.
    assert later.count.inner_instructions["HMMA"] == 2 * 4 * 10 * 35
    assert later.count.inner_instructions["MUFU"] >= 10 * 35
    assert gpu_counts.per_unit(later)["inner_cycles"] < later.count.straight_line_cycles


def test_forward_takes_as_long_as_was_measured(forward: list[gpu_counts.Row]) -> None:
    assert passes_cycles(forward) == pytest.approx(MEASURED[FORWARD, "tf32"], rel=0.1)


def test_no_limit_is_broken(forward: list[gpu_counts.Row]) -> None:
    assert not [x for row in forward for x in broken("tf32", row.count, gpu_counts.per_unit(row))]


def test_partial_sums(forward: list[gpu_counts.Row]) -> None:
    later = next(row.count for row in forward if row.count.role == counts.LATER)
    assert later.stored_bytes == 33 * 128 * 160 * 4  # splits, samples, J · D, float32


def test_no_kernel_spills() -> None:
    assert not [
        name for name, (function, _) in launches.kernels("tf32").items() if gpu_counts.sass.spills(function)
    ]


def test_loops_of_subroutines_are_there_too() -> None:
    kernels = launches.kernels("tf32")
    name = next(name for name in kernels if "begin_backward_kernel" in name)
    assert flow.Flow(kernels[name][0]).loops


@pytest.mark.slow
@pytest.mark.parametrize(("op", "precision"), [key for key in MEASURED if key != (FORWARD, "tf32")])
def test_calls_take_as_long_as_was_measured(op: str, precision: str) -> None:
    rows = gpu_counts.count_call(op, precision)
    assert passes_cycles(rows) == pytest.approx(MEASURED[op, precision], rel=0.12)
    if op == BACKWARD:
        gradients = next(row.count for row in rows if row.count.role == counts.GRADIENTS)
        assert gradients.cycles == pytest.approx(MEASURED_GRADIENTS[precision], rel=0.12)
