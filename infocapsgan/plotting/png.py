"""PNG files: grids of images, and curves."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from infocapsgan.engine.atomic import atomic_file

matplotlib.use("agg")
import matplotlib.pyplot as plt


def grid(images: Tensor, columns: int, *, gap: int = 2) -> Tensor:
    """Images [N, C, H, W] in [0, 1], row by row → one uint8 picture [H′, W′, 3], `gap` pixels between."""
    images = F.pad(images.float().cpu(), [0, gap, 0, gap], value=0.5)
    rows = -(-len(images) // columns)
    empty = images.new_full((rows * columns - len(images), *images.shape[1:]), 0.5)
    images = torch.cat([images, empty]).unflatten(0, (rows, columns))
    picture = images.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    picture = picture.expand(3, -1, -1).permute(1, 2, 0)
    return (picture * 255).round().clamp(0, 255).to(torch.uint8)


def save_png(path: Path, picture: Tensor, *, enlarge: int = 2) -> None:
    """Writes a uint8 picture [H, W, 3], each pixel `enlarge` pixels wide."""
    image = Image.fromarray(np.ascontiguousarray(picture.numpy()))
    image = image.resize((image.width * enlarge, image.height * enlarge), Image.Resampling.NEAREST)
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG")


def save_curves(
    path: Path, rows: Sequence[dict[str, float]], headline: str, baselines: dict[str, float]
) -> None:
    """Losses against steps; beside them shares: the headline metric, its baselines, accuracies in training.

    Args:
        path: of the PNG.
        rows: what metrics.jsonl holds: each with its step and some named numbers.
        headline: the metric that is measured on the test split.
        baselines: what a simpler method reaches, by name.
    """
    training = [row for row in rows if row["kind"] == "train"]
    names = dict.fromkeys(name for row in training for name in row)
    names = [name for name in names if name not in ("kind", "step", "epoch")]
    accuracies = [name for name in names if name.endswith("accuracy")]
    losses = [name for name in names if name not in accuracies]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name in losses:
        left.plot(*_curve(training, name), label=name.replace("_", " "), linewidth=1)
    left.set(xlabel="step", title="losses")
    if losses:
        left.legend(fontsize="small")
    for name in accuracies:
        right.plot(*_curve(training, name), label=f"{name.replace('_', ' ')} in training", linewidth=0.8)
    tested = [row for row in rows if row["kind"] == "evaluation"]
    right.plot(*_curve(tested, headline), "k", marker="o", markersize=3, label="this run")
    for (name, value), style in zip(baselines.items(), ("--", ":", "-."), strict=False):
        right.axhline(value, color="gray", linestyle=style, label=f"{name}: {value:.3f}")
    right.set(xlabel="step", title=headline.replace("_", " "), ylim=(0, 1))
    right.legend(fontsize="small", loc="lower right")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def _curve(rows: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    having = [row for row in rows if name in row]
    return [row["step"] for row in having], [row[name] for row in having]
