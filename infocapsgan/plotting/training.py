"""How a training went: its curves, and the pictures that it left, as an animation."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from infocapsgan.engine.loaded_run import LoadedRun
from infocapsgan.engine.run_directory import SUMMARY, read_metrics
from infocapsgan.evaluate import NotApplicableError
from infocapsgan.plotting.comparison import comparison
from infocapsgan.plotting.sheet import LOG_FROM, new_figure
from infocapsgan.systems import InfoCapsGAN, InfoGAN

CAPSULES = "capsules of generator and discriminator"
WHAT_A_PICTURE_SHOWS = {
    "morph": "along each row a straight line from one latent vector to another, the same in every frame",
    "copies": "ten test images and below them their copies, five times",
    "reconstructions": "test images; below, rebuilt from their true labels, and from the predicted ones",
    "predictions": "test images in the row of the class they are taken for",
}


def curves(
    run: LoadedRun, *, metric: str | None = None, beside: Sequence[Path] = (), reach: Sequence[float] = ()
) -> Figure:
    """Losses and shares of training batches and of held-out images, metrics of the test split, over steps.

    With `metric` that number alone, against epochs, of this run and those beside it; see comparison.
    """
    if metric:
        return comparison(run, metric, beside, reach)
    if beside or reach:
        raise NotApplicableError("--beside, --reach: take --metric, the number to compare")
    rows = read_metrics(run.path)
    batches = [row for row in rows if row["kind"] == "train"]
    tests = [row for row in rows if row["kind"] == "evaluation"]
    held_out = [row for row in rows if row["kind"] == "validation"]
    if not rows:
        raise NotApplicableError(f"curves: {run.path} holds no metrics yet")
    panels = [
        (f"{split}: {kind}", rows, [name for name in _names(rows) if _kind(name) == kind])
        for split, rows in (
            ("training batches", batches),
            ("held-out training images", held_out),
            ("test images", tests),
        )
        for kind in ("losses", "shares", "share of each cluster", CAPSULES)
    ]
    panels = [panel for panel in panels if panel[2]]
    figure = new_figure(
        5.4 * min(3, len(panels)), 4.0 * -(-len(panels) // 3), f"{run.title}\nhow the training went"
    )
    axes = figure.subplots(-(-len(panels) // 3), min(3, len(panels)), squeeze=False).ravel()
    for place, (title, values, names) in zip(axes, panels, strict=False):
        _plot(place, title, values, names)
        if run.system.headline in names and values is tests:
            for name, value in _baselines(run).items():
                place.axhline(value, color="gray", linestyle="--", label=f"{name}: {value:.3f}")
        place.legend(fontsize="x-small", ncols=2 if len(names) > 5 else 1)
    for place in axes[len(panels) :]:
        place.set_visible(False)
    return figure


def _plot(axes: Axes, title: str, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    for name in names:
        having = [row for row in rows if name in row]
        few = {"marker": "o", "markersize": 3} if len(having) < 40 else {}
        axes.plot(
            [row["step"] for row in having],
            [row[name] for row in having],
            label=name.replace("_", " "),
            linewidth=1,
            **few,
        )
    axes.set(xlabel="step", title=title)
    axes.title.set_fontsize("medium")
    if "shares" in title:
        axes.set_ylim(min(0, axes.get_ylim()[0]), 1.02)
    elif "cluster" in title:
        axes.set_ylim(0)
    elif "losses" in title:
        smallest, largest = (pick(row[n] for row in rows for n in names if n in row) for pick in (min, max))
        if smallest > 0 and largest / smallest > LOG_FROM:
            axes.set_yscale("log")


def _kind(name: str) -> str:
    """The panel that a number of metrics.jsonl belongs to."""
    if re.search(r"^share_of_cluster_\d+$", name):
        return "share of each cluster"
    if re.search(r"cosine|distance|capsule_length", name):
        return CAPSULES
    return "shares" if re.search(r"accuracy|^nmi$|^ari$|^pair_error$", name) else "losses"


def _names(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [
        name
        for name in dict.fromkeys(n for row in rows for n in row)
        if name not in ("kind", "step", "epoch")
    ]


def _baselines(run: LoadedRun) -> dict[str, float]:
    file = run.path / SUMMARY
    return json.loads(file.read_text())["baselines"][run.system.headline] if file.exists() else {}


def animate(run: LoadedRun, *, pictures: str | None = None) -> list[Figure]:
    """The pictures in samples/ one after another, each with its step."""
    kept = kept_pictures(run.path)
    if not kept:
        raise NotApplicableError(f"animate: {run.path}/samples holds no pictures")
    name = pictures or ("samples" if "samples" in kept else next(iter(kept)))
    if name not in kept:
        raise NotApplicableError(f"--pictures: got {name}, takes one of {', '.join(kept)}")
    epochs = {row["step"]: row["epoch"] for row in read_metrics(run.path)}
    return [_frame(run, name, path, step, epochs.get(step)) for step, path in kept[name]]


def kept_pictures(run: Path) -> dict[str, list[tuple[int, Path]]]:
    """By name, the steps at which pictures were drawn, and their files."""
    kept: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted((run / "samples").glob("*.png")):
        if matched := re.fullmatch(r"(.+)-(\d{8,})", path.stem):
            kept.setdefault(matched[1], []).append((int(matched[2]), path))
    return kept


def _frame(run: LoadedRun, name: str, path: Path, step: int, epoch: float | None) -> Figure:
    picture = np.asarray(Image.open(path).convert("RGB"))
    height, width = picture.shape[:2]
    when = f"step {step:,}" + (f", epoch {epoch:.1f}" if epoch is not None else "")
    figure = new_figure(width / 120 + 0.9, height / 120 + 1.1)
    axes = figure.subplots()
    axes.set_title(f"{run.subject}\n{when}", fontsize="medium")
    axes.imshow(picture, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_xlabel(_what(run, name), wrap=True)
    if _coded(run, name):
        classes = run.system.image_shape.classes
        axes.set_yticks([(row + 0.5) * height / classes for row in range(classes)], range(classes))
        axes.tick_params(length=0)
        axes.set_ylabel("class code")
    return figure


def _what(run: LoadedRun, name: str) -> str:
    if matched := re.fullmatch(r"continuous_code_(\d+)", name):
        return f"continuous code {matched[1]} from −2 on the left to 2 on the right"
    if name == "samples":
        return "images of the same latent vectors in every frame"
    return WHAT_A_PICTURE_SHOWS.get(name, name)


def _coded(run: LoadedRun, name: str) -> bool:
    coded = isinstance(run.system, (InfoCapsGAN, InfoGAN))
    return coded and (name == "samples" or name.startswith("continuous_code_"))
