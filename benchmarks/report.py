"""Tables of measured rows: for the terminal, and for the README from a file of benchmarks/results/.

python -m benchmarks.report [FILE ...] [--all]      the README's table (with --all every row) in Markdown
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import RESULTS, Row, Target, load

MIB = 1 << 20
_COLUMNS = ("case", "ours", "peer", "which", "ratio", "share", "beyond inputs, MiB", "einsum's", "target")


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 1e-4:
        return f"{seconds * 1e6:.3g} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"


def _times(ratio: float | None) -> str:
    if ratio is None:
        return "–"
    return f"{ratio:.0f} ×" if ratio >= 99.5 else f"{ratio:.3g} ×" if ratio >= 1 else f"{ratio:.2f} ×"


def _mib(size: int | None) -> str:
    if size is None:
        return "–"
    return f"{size / MIB:.1f}" if size < 100 * MIB else f"{size / MIB:.0f}"


def _number(target: Target, value: float) -> str:
    if target.what in ("share", "routing share"):
        return f"{value:.0%}"
    if target.what == "seconds":
        return _time(value)
    return f"{value / MIB:.0f} MiB" if target.what == "memory" else _times(value)


def _target(target: Target) -> str:
    sign = "≤" if target.most else "≥"
    what = {
        "share": " of ceiling",
        "memory ratio": " leaner",
        "overhead": " as long",
        "routing share": " routing",
        "eager": " eager",
        "compiled": " compiled",
    }.get(target.what, "")
    verdict = "met" if target.met else f"MISSED, {_number(target, target.got)}"
    return f"{sign} {_number(target, target.wanted)}{what}: {verdict}"


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table, as _COLUMNS."""
    return (
        f"{row.op}, {row.case}, {row.passes}",
        _time(row.seconds),
        _time(row.peers[row.peer] if row.peer else None),
        row.peer or "–",
        _times(row.ratio),
        "–" if row.share is None else f"{row.share:.0%}",
        _mib(row.memory),
        _mib(row.peers_memory.get("einsum")),
        "; ".join(map(_target, row.targets)) or "–",
    )


def plain_table(rows: Sequence[Row]) -> list[str]:
    """Lines for a terminal."""
    table = [_COLUMNS, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in table]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def markdown_table(rows: Sequence[Row]) -> list[str]:
    table = [_COLUMNS, ("---",) * len(_COLUMNS), *map(cells, rows)]
    return [f"| {' | '.join(line)} |" for line in table]


_PARTS = ("routing", "squash", "convolutions", "loader", "optimiser", "other", "idle")


def parts_table(rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown: seconds of each system's training step, and the share of each part of it."""
    lines = [f"| system | step | {' | '.join(_PARTS)} |", "|---" * (len(_PARTS) + 2) + "|"]
    for row in rows:
        whole = sum(row.details.values())
        shares = [f"{row.details[part] / whole:.1%}" if part in row.details else "–" for part in _PARTS]
        lines.append(f"| {row.op}, {row.case}, {row.dtype} | {_time(row.seconds)} | {' | '.join(shares)} |")
    return lines


def turns_table(row: Row) -> list[str]:
    """Lines of Markdown: a training step in turns with that of the same model routed by a peer."""
    steps, routing = (row.seconds, row.peers[row.peer]), tuple(row.details.values())
    lines = [f"| {row.op}, {row.case}, {row.dtype} | ours | {row.peer} | ratio |", "|---" * 4 + "|"]
    for name, (ours, theirs) in (("whole step", steps), ("routing alone, forward + backward", routing)):
        lines.append(f"| {name} | {_time(ours)} | {_time(theirs)} | {_times(theirs / ours)} |")
    shares = [alone / whole for alone, whole in zip(routing, steps, strict=True)]
    lines.append(
        f"| its share of the step | {shares[0]:.1%} | {shares[1]:.1%} | {_times(shares[1] / shares[0])} |"
    )
    return lines


def systems_tables(rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown: all that benchmarks.systems measures."""
    lines = parts_table([row for row in rows if not row.peers])
    for row in rows:
        lines += ["", *turns_table(row)] if row.peers else []
    return lines


def parts_line(row: Row) -> str:
    """What a step consists of, in words."""
    seconds = ", ".join(f"{part} {_time(value)}" for part, value in row.details.items())
    return f"{row.op}, {row.case}, {row.impl}: {seconds}"


def describe(header: dict) -> str:
    """One line that says what the rows were measured on."""
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
        tables = [table(part) for table, part in ((systems_tables, steps), (markdown_table, others)) if part]
        print("\n\n".join("\n".join(lines) for lines in tables))
        print(f"\n{describe(header)}\n")


if __name__ == "__main__":
    main()
