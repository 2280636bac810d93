"""Losses and metrics of a run against its steps, and one metric of several runs against their epochs."""

import json
import re
from collections.abc import Sequence
from itertools import chain, cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from infocapsgan.engine.loaded_run import LoadedRun
from infocapsgan.engine.run_directory import SUMMARY, read_config, read_metrics
from infocapsgan.metrics import best
from infocapsgan.plotting.figures import LOG_FROM, new_figure
from infocapsgan.systems import NotApplicableError, System

LOSSES, SHARES = "losses", "shares of images and scores, from 0 to 1"
CLUSTERS, CAPSULES = "share of images in each cluster", "capsules of generator and discriminator"
LINE_STYLES = ("-", "--", ":", "-.")
SPLITS = {"train": "training batches", "validation": "held-out training images", "evaluation": "test images"}
Rows = Sequence[dict[str, Any]]


def curves(
    run: LoadedRun, *, metric: str | None = None, beside: Sequence[Path] = (), reach: Sequence[float] = ()
) -> Figure:
    """Losses and metrics of training batches, held-out and test images against steps; or one of several runs.

    Args:
        metric: one number only, against epochs.
        beside: runs whose metric is plotted, too.
        reach: values of the metric: the legend says in which epoch each run reached them.
    """
    if metric:
        return comparison([run.path, *beside], metric, reach)
    if beside or reach:
        raise NotApplicableError("--beside, --reach: take --metric, the number to compare")
    rows = read_metrics(run.path)
    if not rows:
        raise NotApplicableError(f"curves: {run.path} holds no metrics yet")
    summary = run.path / SUMMARY
    baselines = json.loads(summary.read_text())["baselines"] if summary.exists() else {}
    title = f"{run.title}\nlosses and metrics during training"
    return training_curves(rows, run.system, baselines.get(run.system.headline, {}), title)


def training_curves(rows: Rows, system: System, baselines: dict[str, float], title: str) -> Figure:
    """A panel for each split and each kind of number in rows of metrics.jsonl.

    `baselines` are values of the system's headline metric that simpler methods reach, by name.
    """
    panels = []
    for split, images in SPLITS.items():
        of_split = [row for row in rows if row["kind"] == split]
        names = [name for name in dict.fromkeys(chain(*of_split)) if name not in ("kind", "step", "epoch")]
        for kind in (LOSSES, SHARES, CLUSTERS, CAPSULES):
            if of_kind := [name for name in names if _kind(name) == kind]:
                panels.append((f"{images}: {kind}", kind, of_split, of_kind))
    wide = 2 if len(panels) in (2, 4) else min(3, len(panels))
    high = -(-len(panels) // wide)
    figure = new_figure(5.4 * wide, 5.0 * high, title)
    axes = figure.subplots(high, wide, squeeze=False).ravel()
    for place, (heading, kind, values, of_kind) in zip(axes, panels, strict=False):
        _plot(place, kind, values, of_kind, system.terms)
        place.set_xlabel("step")
        place.set_title(heading, fontsize="medium")
        if system.headline in of_kind and values[0]["kind"] == "evaluation":
            for (name, value), style in zip(baselines.items(), cycle(LINE_STYLES[1:]), strict=False):
                place.axhline(value, color="gray", linestyle=style, label=f"{name}: {value:.3f}")
        below = {"loc": "upper left", "bbox_to_anchor": (0, -0.13), "frameon": False}
        place.legend(fontsize="x-small", ncols=3 if kind == CLUSTERS else 1, **below)
    for place in axes[len(panels) :]:
        place.set_visible(False)
    return figure


def _plot(axes: Axes, kind: str, rows: Rows, names: Sequence[str], terms: dict[str, str]) -> None:
    for name in names:
        line = [(row["step"], row[name]) for row in rows if name in row]
        label = f"{name.replace('_', ' ')} {terms.get(name, '')}".rstrip()
        marker = "o" if len(line) < 40 else ""
        axes.plot(*zip(*line, strict=True), label=label, linewidth=1, marker=marker, markersize=3)
    if kind == SHARES:
        axes.set_ylim(min(0, axes.get_ylim()[0]), 1.02)
    elif kind == CLUSTERS:
        axes.set_ylim(0)
    elif kind == LOSSES:
        values = [row[name] for row in rows for name in names if name in row]
        if min(values) > 0 and max(values) / min(values) > LOG_FROM:
            axes.set_yscale("log")


def _kind(name: str) -> str:
    """The panel that a number of metrics.jsonl belongs to."""
    if re.search(r"^share_of_cluster_\d+$", name):
        return CLUSTERS
    if re.search(r"cosine|distance|capsule_length", name):
        return CAPSULES
    return SHARES if re.search(r"accuracy|^nmi$|^ari$|^pair_error$", name) else LOSSES


def comparison(paths: Sequence[Path], metric: str, reach: Sequence[float] = ()) -> Figure:
    """A metric of the runs against epochs, and the epoch in which each first reached each value of `reach`.

    Runs of one system have a colour each; of several systems, a colour a system and a line style a run.
    """
    if reach and best(metric, [0.0]) is None:
        raise NotApplicableError(f"--reach: neither more nor less of {metric} is better")
    runs = []
    for path in paths:
        config = read_config(path)
        if not (line := _points(read_metrics(path), metric)):
            raise NotApplicableError(f"--metric: {path} holds no {metric}")
        runs.append((path, f"{config.system} on {config.settings['dataset']}", line))
    systems = list(dict.fromkeys(system for _, system, _ in runs))
    figure = new_figure(7.5, 5.0, f"{metric.replace('_', ' ')} during training")
    axes = figure.subplots()
    for number, (path, system, line) in enumerate(runs):
        same = [other for _, other, _ in runs[:number]].count(system)
        colour, style = (number, number // 10) if len(systems) == 1 else (systems.index(system), same)
        epochs = [f"{value:g} in epoch {_first_epoch(line, metric, value)}" for value in reach]
        label = "\n".join([f"{system}: {path.resolve().name}", *epochs])
        (plotted,) = axes.plot(*zip(*line, strict=True), label=label, marker="o", markersize=3, linewidth=1)
        plotted.set(color=f"C{colour % 10}", linestyle=LINE_STYLES[style % 4])
    for value in reach:
        axes.axhline(value, color="gray", linestyle="--", linewidth=0.8)
    values = [value for _, _, line in runs for _, value in line]
    if 0 < LOG_FROM * min(values) < max(values):
        axes.set_yscale("log")
    axes.set(xlabel="epoch", ylabel=metric.replace("_", " "))
    axes.legend(fontsize="small")
    return figure


def _points(rows: Rows, metric: str) -> list[tuple[float, float]]:
    """Epoch and value of each evaluation that holds the metric; where none does, of each row that does."""
    having = [row for row in rows if metric in row]
    evaluations = [row for row in having if row["kind"] == "evaluation"]
    return [(row["epoch"], row[metric]) for row in evaluations or having]


def _first_epoch(line: Sequence[tuple[float, float]], metric: str, value: float) -> str:
    """That of the first point that is no worse than `value`; – where there is none."""
    return next((f"{epoch:.3g}" for epoch, reached in line if best(metric, [reached, value]) == reached), "–")
