"""What `python -m capsops bench` prints: where it was measured, a table for each mode, notes."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from capsops.measuring.formats import duration, markdown, mebibytes, times
from capsops.measuring.headline import OURS, Row, fastest
from capsops.measuring.passes import FORWARD

WIDTH = 100  # columns of a terminal

LEGEND = (
    "eager, compiled: the fastest form of plain PyTorch (matmul, einsum, sums: how it is written). ratio: how"
    " many times as long the faster of the two takes. share: of the speed that the measured ceiling"
    " of the device allows"
)
MEMORY_LEGEND = ". MiB: memory beyond the inputs, of ours and of the eager form"


def describe(facts: Mapping[str, Any]) -> list[str]:
    """The op, the device and its ceiling, versions, date."""
    device, versions, ceilings = facts["device"], facts["versions"], facts["ceilings"]
    sizes = ", ".join(f"{axis}={size}" for axis, size in facts["layer"].items())
    packages = ", ".join(f"{x} {versions[x] or 'not here'}" for x in ("capsops", "torch", "triton"))
    unit = "threads" if device["type"] == "cpu" else "multiprocessors"
    if device["type"] == "cpu":
        ceiling = f"{ceilings['float32'] / 1e9:.0f} GFLOP/s ({facts['how']})"
    else:
        rates = [f"{x} {ceilings[x] / 1e12:.3g}" for x in facts["precisions"]]
        ceiling = f"{', '.join(rates)} TFLOP/s; {ceilings['bandwidth'] / 1e12:.3g} TB/s"
    return [
        f"{facts['op']}, {sizes}, impl={facts['impl']}",
        f"{device['model']}, {device[unit]} {unit}, {device['isa']}",
        f"{packages}, {versions['system']}, {facts['date'][:10]}",
        f"ceiling: {ceiling}",
    ]


def _seconds(seconds: Mapping[str, float]) -> str:
    name = fastest(seconds)
    return "–" if name is None else f"{duration(seconds[name])} {name.removeprefix('einsum + ')}"


def table(rows: Sequence[Row]) -> list[str]:
    """A line for each of some rows that differ in batch and passes."""
    columns = ["case", "ours", "eager", "compiled", "ratio", "share"]
    cells = [
        [
            f"B={row.batch} {'forward' if row.passes == FORWARD else '+ backward'}",
            duration(row.ours),
            _seconds(row.eager),
            _seconds(row.compiled),
            "–" if row.ratio is None else times(row.ratio),
            f"{row.share:.0%}",
        ]
        for row in rows
    ]
    if any(row.memory for row in rows):
        columns += ["MiB", "eager's"]
        for row, line in zip(rows, cells, strict=True):
            names = (OURS, fastest(row.eager))
            line += [mebibytes(row.memory.get(name) if name else None) for name in names]
    return markdown(columns, cells)


def report(facts: Mapping[str, Any], rows: Sequence[Row], notes: Sequence[str]) -> str:
    """All of it, in lines of at most WIDTH columns."""
    lines = [part for line in describe(facts) for part in textwrap.wrap(line, WIDTH, subsequent_indent="  ")]
    for precision, timed_by in dict.fromkeys((row.precision, row.timed_by) for row in rows):
        chosen = [row for row in rows if (row.precision, row.timed_by) == (precision, timed_by)]
        impls = ", ".join(dict.fromkeys(row.impl for row in chosen))
        lines += ["", f"{precision}, timed by {timed_by}; ours: {impls}", "", *table(chosen)]
    lines += ["", *textwrap.wrap(LEGEND + (MEMORY_LEGEND if any(row.memory for row in rows) else ""), WIDTH)]
    for note in notes:
        lines += textwrap.wrap(f"- {note}", WIDTH, subsequent_indent="  ")
    return "\n".join(lines)
