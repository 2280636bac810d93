"""What the kernels may take at most, in the counts of benchmarks/gpu_counts.py."""

from collections.abc import Iterator, Mapping

from benchmarks.gpu.counts import GRADIENTS, LATER, Count

# Cycles of the inner loops for 32 samples and one input capsule, by role and precision: those of today, and
# 5 % for other compilers. The goals are 400 for a later pass in TF32 and bfloat16, 700 in float32, and for
# the gradients a third of what they take today.
INNER_CYCLES = {
    (LATER, "tf32"): 720,  # backward; forward takes 399
    (LATER, "bfloat16"): 650,
    (LATER, "float32"): 1100,
    (GRADIENTS, "tf32"): 4840,
    (GRADIENTS, "bfloat16"): 4940,
    (GRADIENTS, "float32"): 10340,
}


def broken(precision: str, count: Count, per_unit: Mapping[str, float]) -> Iterator[str]:
    """A line for each limit that a step breaks."""
    if count.spills:
        yield f"BROKEN: {precision}, {count.kernel} spills registers: {count.spills} loads and stores"
    limit = INNER_CYCLES.get((count.role, precision))
    got = per_unit["inner_cycles"]
    if limit is not None and got > limit:
        yield f"BROKEN: {precision}, {count.kernel}, {count.role}: {got:.0f} cycles, at most {limit}"
