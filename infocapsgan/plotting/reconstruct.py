"""Test images and their reconstructions."""

import torch
from matplotlib.figure import Figure

from infocapsgan.data.dataset import to_unit
from infocapsgan.engine.loaded_run import LoadedRun
from infocapsgan.engine.settings import Count
from infocapsgan.plotting.figures import CELL, Sheet, sheet_figure


def reconstruct(run: LoadedRun, *, images: Count = 10) -> Figure:
    """Test images and their reconstructions: from the true label, and below from the predicted one.

    Args:
        images: how many test images.
    """
    run.system.require("reconstruct", "reconstruct")
    dataset, title = run.dataset.head(images), f"{run.title}\ntest images and their reconstructions"
    if run.system.why_not("decode"):
        pixels = dataset.test_images
        both = torch.cat([to_unit(pixels), run.system.reconstruct(pixels)])
        return sheet_figure(title, Sheet(both, len(pixels), ["image", "reconstruction"]))
    sheet = run.system.reconstruction_sheet(dataset)
    # The images must be wide enough for the names above them.
    widest = max(len(line) for head in sheet.heads for line in head.split("\n"))
    return sheet_figure(title, sheet, max(CELL, 0.08 * widest))
