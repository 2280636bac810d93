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
from torch import Tensor

from infocapsgan.engine.atomic import atomic_file

CELL = 0.52  # inches that an image is wide, if not told otherwise
LINE = 0.3  # height of a line of a caption, as a part of the image's
DPI = 120
LOG_FROM = 30  # values that differ more than so many times are drawn on a logarithmic axis


def sheet(
    axes: Axes,
    images: Tensor,
    columns: int,
    *,
    rows: Sequence[str] = (),
    heads: Sequence[str] = (),
    captions: Sequence[str] = (),
    xlabel: str = "",
    ylabel: str = "",
) -> None:
    """Fills axes with rows of images.

    Args:
        axes: to fill.
        images: [N, C, H, W] in [0, 1], row by row; a last row may be shorter.
        columns: images in a row.
        rows: what each row is.
        heads: what each column is.
        captions: what stands above each image.
        xlabel, ylabel: what the columns and the rows stand for.
    """
    _, _, H, W = images.shape
    above, between = round(LINE * H * _lines(captions)), 2
    high, wide = H + above + between, W + between
    lines = -(-len(images) // columns)
    padded = F.pad(images.float().cpu(), [0, between, above, between], value=1.0)
    padded = torch.cat([padded, padded.new_ones(lines * columns - len(images), *padded.shape[1:])])
    picture = padded.unflatten(0, (lines, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    picture = picture.expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1)
    axes.imshow(picture.numpy(), interpolation="nearest")
    axes.set_yticks([high * row + above + H / 2 for row in range(len(rows))], rows)
    axes.set_xticks([wide * column + W / 2 for column in range(len(heads))], heads)
    axes.tick_params(length=0, labelsize="small")
    axes.spines[:].set_visible(False)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    for place, caption in enumerate(captions):
        row, column = divmod(place, columns)
        x, y = wide * column + W / 2, high * row + above - 2
        axes.text(x, y, caption, ha="center", va="bottom", fontsize="x-small")


def sheet_size(
    count: int, columns: int, *, cell: float = CELL, captions: Sequence[str] = ()
) -> tuple[float, float]:
    """Width and height in inches that a sheet of `count` images takes, labels included."""
    high = cell * (1.07 + LINE * _lines(captions))
    return columns * cell * 1.07 + 1.1, -(-count // columns) * high + 1.1


def _lines(captions: Sequence[str]) -> int:
    return max((caption.count("\n") + 1 for caption in captions), default=0)


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """An empty figure of that size in inches, never narrower than a title needs."""
    figure = Figure(figsize=(max(width, 6.5), max(height, 2.0)), dpi=DPI, layout="constrained")
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure


def sheet_figure(
    title: str, images: Tensor, columns: int, *, cell: float = CELL, **labels: str | Sequence[str]
) -> Figure:
    """A figure of one sheet, its images `cell` inches wide; `labels` as sheet() takes them."""
    captions = labels.get("captions", ())
    figure = new_figure(*sheet_size(len(images), columns, cell=cell, captions=captions))
    axes = figure.subplots()
    sheet(axes, images, columns, **labels)
    axes.set_title(title, fontsize="medium")
    return figure


def save_figure(path: Path, figure: Figure) -> None:
    """Writes a PNG."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")


def save_gif(path: Path, figures: Sequence[Figure], milliseconds: int) -> None:
    """Writes a GIF that is repeated for ever; each figure is shown that long, the last four times as long."""
    frames = [Image.fromarray(pixels(figure)) for figure in figures]
    # One palette for all, so that the still parts of the figure do not flicker.
    some = [frames[0], frames[len(frames) // 2], frames[-1]]
    together = Image.new("RGB", (frames[0].width, len(some) * frames[0].height))
    for place, frame in enumerate(some):
        together.paste(frame, (0, place * frame.height))
    palette = together.quantize(256)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    shown = [milliseconds] * (len(frames) - 1) + [4 * milliseconds]
    with atomic_file(path) as temporary:
        frames[0].save(
            temporary, format="GIF", save_all=True, append_images=frames[1:], duration=shown, loop=0
        )


def pixels(figure: Figure) -> np.ndarray:
    """A figure as uint8 [H, W, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
