"""Tables of measured rows, in Markdown that a terminal shows well too.

python -m benchmarks.report [FILE ...] [--all]      the README's table (with --all every row)
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import RESULTS, Row, Target, load
from capsops.measuring.formats import MIB, duration, markdown, mebibytes, times

_COLUMNS = ("case", "ours", "peer", "which", "ratio", "share", "beyond inputs, MiB", "peer's", "target")
_COMPARED_WITH = {"share": " of ceiling", "memory ratio": " leaner", "overhead": " as long"}


def _target(target: Target) -> str:
    def number(value: float) -> str:
        if target.what == "share":
            return f"{value:.0%}"
        if target.what == "seconds":
            return duration(value)
        return f"{value / MIB:.0f} MiB" if target.what == "memory" else times(value)

    verdict = "met" if target.met else f"MISSED, {number(target.got)}"
    what = _COMPARED_WITH.get(target.what, "")
    return f"{'≤' if target.most else '≥'} {number(target.wanted)}{what}: {verdict}"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f"{row.op}, {row.case}, {row.passes}",
        duration(row.seconds),
        duration(row.peers[row.peer]),
        row.peer,
        times(row.ratio),
        "–" if row.share is None else f"{row.share:.0%}",
        mebibytes(row.memory),
        mebibytes(row.peers_memory.get("einsum", row.peers_memory.get(row.peer))),
        "; ".join(map(_target, row.targets)) or "–",
    )


def table(rows: Sequence[Row]) -> list[str]:
    """A line for each row: time, the fastest peer, share of the ceiling, memory, targets.

    The peer's memory is that of the einsum form where that one was measured.
    """
    return markdown(_COLUMNS, map(_cells, rows))


def steps_list(rows: Sequence[Row]) -> list[str]:
    """An item for each training step: its time, and each part of it with its share of the step."""
    lines = []
    for row in rows:
        steps = f"step {duration(row.seconds)}" + "".join(
            f", {peer} {duration(seconds)} ({times(seconds / row.seconds)})"
            for peer, seconds in row.peers.items()
        )
        whole = row.seconds if row.peers else sum(row.details.values())  # those of the profiler add up
        parts = [
            f"{part} {duration(seconds)}"
            f" ({seconds / (row.peers['einsum'] if 'einsum' in part else whole):.1%})"
            for part, seconds in row.details.items()
        ]
        lines.append(f"- {row.op}, {row.case}, {row.dtype}: {steps}: {', '.join(parts)}")
    return lines


def describe(header: dict) -> str:
    """One line with what the rows were measured on."""
    device, versions, ceiling = header["device"], header["versions"], header["ceiling"]
    commit = header["commit"][:9] + (" with changes" if header["dirty"] else "")
    return (
        f"{device['model']}, {device['threads']} threads, {device['isa']}, "
        f"load {device['load_before']:.1f} before; "
        f"ceiling {ceiling['flops'] / 1e9:.0f} GFLOP/s ({ceiling['how']}); torch {versions['torch']}, "
        f"capsops {versions['capsops']} at {commit}, {header['date'][:10]}: `{header['command']}`"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: all of benchmarks/results/")
    parser.add_argument("--all", action="store_true", help="every row, not only those with a target")
    args = parser.parse_args()
    for path in args.files or sorted(RESULTS.glob("*.json")):
        header, rows = load(path)
        steps = [row for row in rows if row.suite == "systems"]
        others = [row for row in rows if row not in steps and (args.all or row.targets)]
        tables = [show(part) for show, part in ((steps_list, steps), (table, others)) if part]
        print("\n\n".join("\n".join(lines) for lines in tables))
        print(f"\n{describe(header)}\n")


if __name__ == "__main__":
    main()
