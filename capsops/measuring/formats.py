"""Measured numbers as text, and tables in Markdown that a terminal shows well too."""

from collections.abc import Iterable, Sequence

MIB = 1 << 20


def duration(seconds: float) -> str:
    if seconds < 1e-4:
        return f"{seconds * 1e6:.3g} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"


def times(ratio: float) -> str:
    return f"{ratio:.0f} ×" if ratio >= 99.5 else f"{ratio:.3g} ×" if ratio >= 1 else f"{ratio:.2f} ×"


def mebibytes(size: int | None) -> str:
    if size is None:
        return "–"
    return f"{size / MIB:.1f}" if size < 100 * MIB else f"{size / MIB:.0f}"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table whose columns are as wide as their longest cell."""
    cells = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    padded = ([x.ljust(width) for x, width in zip(line, widths, strict=True)] for line in cells)
    return [f"| {' | '.join(line)} |" for line in padded]
