"""Microseconds of a call of routing, from the cycles of its launches.

What is assumed beside the cycle model stands here.
"""

from collections.abc import Sequence

from benchmarks.gpu.counts import Count

GIGAHERTZ = 1.755  # the clock that an H200 keeps under load; it may reach 1.98
GRID_BARRIER = 1.0  # microseconds; 0.97 were measured
LAUNCH = 3.0  # microseconds between launches in a graph, and before the first


def microseconds(steps: Sequence[Count], launches: int) -> float:
    """`steps` run in so many launches, with a barrier of the grid between those of one launch."""
    cycles = sum(step.cycles for step in steps)
    return cycles / GIGAHERTZ / 1e3 + (len(steps) - launches) * GRID_BARRIER + launches * LAUNCH
