"""What a classifier makes of an image that is rotated through 360°."""

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from infocapsgan.data.dataset import to_unit
from infocapsgan.engine.loaded_run import LoadedRun
from infocapsgan.engine.settings import Count, Whole
from infocapsgan.plotting.figures import Sheet, draw_sheet, new_figure, sheet_size
from infocapsgan.systems import NotApplicableError, System

PER_ROW = 12


def rotate(run: LoadedRun, *, image: Whole = 0, degrees: Count = 15) -> Figure:
    """An image rotated through 360°: the longest class capsule, its length, and the reconstruction from it.

    Args:
        image: number of the test image, from 0 on.
        degrees: from one angle to the next.
    """
    system = run.system
    pixels, label = labelled_image(run, "classify", "rotate", image)
    angles = torch.arange(0, 360, degrees, device=run.device)
    images = rotated(pixels, angles)
    longest, classes = system.classify(images).max(dim=1)
    shown, rows = images[None], ["rotated"]
    if not system.why_not("reconstruct"):
        shown, rows = torch.stack([images, system.reconstruct(images)]), ["rotated", "reconstructed"]
    padded = F.pad(shown, [0] * 7 + [-len(angles) % PER_ROW], value=1.0).split(PER_ROW, dim=1)
    of_each = zip(angles.tolist(), map(system.class_name, classes), longest.tolist(), strict=True)
    heads = [f"{angle}°\n{name}\n{length:.2f}" for angle, name, length in of_each]
    sheets = [
        Sheet(part.flatten(0, 1), PER_ROW, rows, heads[number * PER_ROW : (number + 1) * PER_ROW])
        for number, part in enumerate(padded)
    ]
    sheets[-1] = sheets[-1]._replace(xlabel="angle, predicted class, length of its capsule")
    width, height = sheet_size(sheets[0], 0.75)
    title = f"{run.title}\ntest image {image} ({system.class_name(label)}), rotated counter-clockwise"
    figure = new_figure(width, 2.6 + len(sheets) * height, title)
    curve, *places = figure.subplots(1 + len(sheets), 1, height_ratios=[2.2] + [height] * len(sheets))
    _plot_lengths(curve, system, angles.cpu(), classes.cpu(), longest.cpu())
    for axes, sheet in zip(places, sheets, strict=True):
        draw_sheet(axes, sheet)
    return figure


def _plot_lengths(axes: Axes, system: System, angles: Tensor, classes: Tensor, longest: Tensor) -> None:
    axes.plot(angles, longest, color="lightgray", zorder=1)
    for j in classes.unique():
        here, label = classes == j, f"predicted {system.class_name(j)}"
        axes.scatter(angles[here], longest[here], label=label, color=f"C{j % 10}", zorder=2)
    axes.set(xlabel="angle in degrees", ylabel="length of the\nlongest class capsule", ylim=(0, 1.02))
    axes.set_xticks(range(0, 361, 45))
    axes.legend(fontsize="small", loc="lower right", bbox_to_anchor=(1, 1), frameon=False, ncols=10)


def rotated(image: Tensor, degrees: Tensor) -> Tensor:
    """An image [1, C, H, W] rotated counter-clockwise by each of the angles [N]; new corners are black."""
    angle = torch.deg2rad(degrees.float())
    cosine, sine, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # Where a pixel of the rotated image comes from: y grows downwards.
    matrix = torch.stack([cosine, -sine, zero, sine, cosine, zero], dim=1).view(-1, 2, 3)
    places = F.affine_grid(matrix, [len(degrees), *image.shape[1:]], align_corners=False)
    return F.grid_sample(image.expand(len(degrees), -1, -1, -1), places, align_corners=False)


def labelled_image(run: LoadedRun, ability: str, kind: str, index: int) -> tuple[Tensor, Tensor]:
    """A test image [1, C, H, W] in [0, 1] and its label [1], for a kind of picture that takes an ability."""
    run.system.require(ability, kind)
    dataset = run.dataset
    if dataset.test_labels.dim() == 2:
        raise NotApplicableError(f"{kind} does not apply to pairs of digits; reconstruct does")
    if index >= len(dataset.test_labels):
        raise NotApplicableError(f"--image: got {index}, takes 0 to {len(dataset.test_labels) - 1}")
    return to_unit(dataset.test_images[index : index + 1]), dataset.test_labels[index : index + 1]
