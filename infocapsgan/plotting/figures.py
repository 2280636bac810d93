"""Figures whose axes say what they show."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from infocapsgan.engine.atomic import atomic_file
from infocapsgan.plotting.sheet import Sheet

CELL = 0.52  # inches that an image is wide, if not told otherwise
LINE = 0.3  # height of a line of a caption, as a part of the image's
DPI = 120
LOG_FROM = 30  # values that differ more than so many times are drawn on a logarithmic axis


def draw_sheet(axes: Axes, sheet: Sheet) -> None:
    """Fills axes with the images and labels of a sheet."""
    images, columns = sheet.images, sheet.columns
    _, _, H, W = images.shape
    above, between = round(LINE * H * _lines(sheet)), 2
    high, wide = H + above + between, W + between
    lines = -(-len(images) // columns)
    padded = F.pad(images.float().cpu(), [0, between, above, between], value=1.0)
    padded = torch.cat([padded, padded.new_ones(lines * columns - len(images), *padded.shape[1:])])
    picture = padded.unflatten(0, (lines, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    picture = picture.expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1)
    axes.imshow(picture.numpy(), interpolation="nearest")
    axes.set_yticks([high * row + above + H / 2 for row in range(len(sheet.rows))], sheet.rows)
    axes.set_xticks([wide * column + W / 2 for column in range(len(sheet.heads))], sheet.heads)
    axes.tick_params(length=0, labelsize="small")
    axes.spines[:].set_visible(False)
    axes.set(xlabel=sheet.xlabel, ylabel=sheet.ylabel)
    for place, caption in enumerate(sheet.captions):
        row, column = divmod(place, columns)
        x, y = wide * column + W / 2, high * row + above - 2
        axes.text(x, y, caption, ha="center", va="bottom", fontsize="x-small")


def sheet_size(sheet: Sheet, cell: float = CELL) -> tuple[float, float]:
    """Width and height in inches that a sheet takes with its labels, its images `cell` inches wide."""
    high = cell * (1.07 + LINE * _lines(sheet))
    return sheet.columns * cell * 1.07 + 1.1, -(-len(sheet.images) // sheet.columns) * high + 1.1


def _lines(sheet: Sheet) -> int:
    return max((caption.count("\n") + 1 for caption in sheet.captions), default=0)


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """An empty figure of that size in inches, never narrower than a title needs."""
    figure = Figure(figsize=(max(width, 6.5), max(height, 2.0)), dpi=DPI, layout="constrained")
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure


def sheet_figure(title: str, sheet: Sheet, cell: float = CELL) -> Figure:
    """A figure of one sheet, its images `cell` inches wide."""
    figure = new_figure(*sheet_size(sheet, cell))
    axes = figure.subplots()
    draw_sheet(axes, sheet)
    axes.set_title(title, fontsize="medium")
    return figure


def save_figure(path: Path, figure: Figure) -> None:
    """Writes a PNG."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")


def save_gif(path: Path, frames: Sequence[Image.Image], milliseconds: int = 400) -> None:
    """Writes a GIF that is repeated for ever; each frame is shown that long, the last four times as long."""
    # One palette for all, so that the still parts of the frames do not flicker.
    some = np.vstack([np.asarray(frames[place]) for place in (0, len(frames) // 2, -1)])
    palette = Image.fromarray(some).quantize(256)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    shown = [milliseconds] * (len(frames) - 1) + [4 * milliseconds]
    with atomic_file(path) as temporary:
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], duration=shown, loop=0)


def pixels(figure: Figure) -> np.ndarray:
    """A figure as uint8 [H, W, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
