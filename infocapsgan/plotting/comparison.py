"""One number of several runs against their epochs, and when each run reached a value of it."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from infocapsgan.engine.loaded_run import LoadedRun
from infocapsgan.engine.run_directory import read_config, read_metrics
from infocapsgan.evaluate import NotApplicableError
from infocapsgan.metrics.clustering import best
from infocapsgan.plotting.sheet import LOG_FROM, new_figure


def comparison(run: LoadedRun, metric: str, beside: Sequence[Path], reach: Sequence[float]) -> Figure:
    """`metric` of the runs against epochs: a colour a system, a line a run.

    Args:
        found: the first run.
        metric: a number of metrics.jsonl.
        beside: the directories of the other runs.
        reach: values, each drawn as a line across; the legend tells the epoch of the first evaluation of each
            run that is no worse.

    Raises:
        NotApplicableError: a run does not hold the metric, or nothing says which of its values are better.
        RunError: there is no such run.
    """
    if reach and best(metric, [0.0]) is None:
        raise NotApplicableError(f"--reach: neither more nor less of {metric} is better")
    runs: dict[str, list[list[tuple[float, float]]]] = {}
    for path in (run.path, *beside):
        name, settings, *_ = read_config(path)
        values = points(read_metrics(path), metric)
        if not values:
            raise NotApplicableError(f"--metric: {path} holds no {metric}")
        runs.setdefault(f"{name} on {settings['dataset']}", []).append(values)
    figure = new_figure(7.5, 5.0, f"{metric.replace('_', ' ')} as training goes on")
    axes = figure.subplots()
    for colour, (name, lines) in zip(cycle(f"C{n}" for n in range(10)), runs.items(), strict=False):
        epochs = (
            f"{value:g}: " + ", ".join(_shown(first_epoch(line, metric, value)) for line in lines)
            for value in reach
        )
        label = "\n".join([f"{name}, {len(lines)} run{'s' * (len(lines) > 1)}", *epochs])
        for line in lines:
            axes.plot(
                *zip(*line, strict=True), color=colour, label=label, marker="o", markersize=3, linewidth=1
            )
            label = None
    for value in reach:
        axes.axhline(value, color="gray", linestyle="--", linewidth=0.8)
    drawn = [value for lines in runs.values() for line in lines for _, value in line]
    if 0 < LOG_FROM * min(drawn) < max(drawn):
        axes.set_yscale("log")
    axes.set(xlabel="epoch", ylabel=metric.replace("_", " "))
    axes.legend(title="reached at epoch" if reach else None, fontsize="small", title_fontsize="small")
    return figure


def points(rows: Sequence[dict[str, Any]], metric: str) -> list[tuple[float, float]]:
    """Epoch and value of each evaluation that holds the metric; where none does, of each row that does."""
    having = [row for row in rows if metric in row]
    evaluations = [row for row in having if row["kind"] == "evaluation"]
    return [(row["epoch"], row[metric]) for row in evaluations or having]


def first_epoch(values: Sequence[tuple[float, float]], metric: str, value: float) -> float | None:
    """The epoch of the first point that is no worse than `value`; None where there is none."""
    return next((epoch for epoch, found in values if best(metric, [found, value]) == found), None)


def _shown(epoch: float | None) -> str:
    return "–" if epoch is None else f"{epoch:.3g}"
