"""What a CapsNet's capsules hold: reconstructions, and how they follow the image and the capsule."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from infocapsgan.data.dataset import to_symmetric, to_unit
from infocapsgan.engine.loaded_run import LoadedRun
from infocapsgan.evaluate import NotApplicableError
from infocapsgan.models.capsule_encoder import lengths
from infocapsgan.models.decoders import masked
from infocapsgan.plotting.primary_decoder import couplings_to, primary_decoder
from infocapsgan.plotting.sheet import CELL, new_figure, sheet, sheet_figure, sheet_size
from infocapsgan.systems import CapsNet, Encoder, Mimic
from infocapsgan.systems.capsnet import encoder_input, label_columns

TWEAKS = torch.arange(-5, 6) * 0.05
SHOWN_CAPSULES = 10


def reconstruct(run: LoadedRun, *, images: int = 10) -> Figure:
    """Test images and what is rebuilt of them: from the true label, and below from the predicted one."""
    dataset = run.dataset.head(images)
    if isinstance(run.system, Mimic):
        real = to_symmetric(dataset.test_images)
        rows = torch.cat([real, run.system.mimicked(real)])
        title = f"{run.title}\ntest images and what the generator draws of their last capsule"
        return sheet_figure(title, (rows + 1) / 2, len(real), rows=["image", "copy"])
    system = _capsnet(run, "reconstruct")
    pixels, labels = to_unit(dataset.test_images), dataset.test_labels
    capsules = system.model.encoder(encoder_input(pixels)).classes
    predicted = system.predicted(capsules, labels)
    shown, rows = [encoder_input(pixels)], ["image"]
    for name, classes in (("true", labels), ("predicted", predicted)):
        for digit, one in enumerate(label_columns(classes).unbind(1)):
            shown.append(system.model.decoder(masked(capsules, one)))
            rows.append(f"from the {name} label" + f", digit {digit + 1}" * (classes.dim() == 2))
    heads = [f"{run.named(true)}\n{run.named(guess)}" for true, guess in zip(labels, predicted, strict=True)]
    title = f"{run.title}\ntest images and their reconstructions"
    labelled = {"rows": rows, "heads": heads, "xlabel": "true label, and below the predicted one"}
    return sheet_figure(title, torch.cat(shown), len(pixels), cell=_cell(heads), **labelled)


def tweak(run: LoadedRun, *, image: int = 0) -> Figure:
    """Each number of an image's class capsule changed by −0.25 to 0.25: a row for each, rebuilt."""
    system = _capsnet(run, "tweak", single=True)
    pixels, label = _test_image(run, image)
    capsules = system.model.encoder(pixels).classes
    predicted = system.predicted(capsules, label)
    taken = f"{run.named(label)}, taken for {run.named(predicted)}"
    D, count = capsules.shape[2], len(TWEAKS)
    changed = capsules.repeat(D * count, 1, 1)
    change = torch.kron(torch.eye(D), TWEAKS[:, None]).to(run.device)  # [D · count, D]
    changed[:, predicted.item()] += change
    rebuilt = system.model.decoder(masked(changed, predicted.expand(len(changed)))).unflatten(0, (D, count))
    shown = torch.cat([pixels.expand(D, 1, *pixels.shape[1:]), rebuilt], dim=1)
    return sheet_figure(
        f"{run.title}\ntest image {image} ({taken}): each number of its capsule changed",
        shown.flatten(0, 1),
        count + 1,
        rows=[str(d) for d in range(D)],
        heads=["image", *(f"{value:+.2f}" if value else "0" for value in TWEAKS.tolist())],
        ylabel="number of the class capsule",
        xlabel="what is added to it",
    )


def rotate(run: LoadedRun, *, image: int = 0, degrees: int = 15) -> Figure:
    """An image turned through 360°: the longest capsule, its length, and what is rebuilt from it."""
    system = run.system
    if not isinstance(system, (CapsNet, Encoder)):
        raise NotApplicableError(f"rotate does not apply to {run.name}: it is not trained with labels")
    _single_labels(run, "rotate")
    pixels, label = _test_image(run, image)
    angles = list(range(0, 360, degrees))
    images = turned(pixels, torch.tensor(angles, device=run.device))
    model = system.model
    capsules = model.encoder(images).classes if isinstance(system, CapsNet) else model(images * 2 - 1).classes
    longest, classes = lengths(capsules).max(dim=1)
    rebuilt = model.decoder(masked(capsules, classes)) if isinstance(system, CapsNet) else None
    title = f"{run.title}\ntest image {image} ({run.named(label)}), turned counter-clockwise"
    per_row, rows = 12, ["turned"] if rebuilt is None else ["turned", "rebuilt"]
    starts = range(0, len(angles), per_row)
    width, height = sheet_size(len(rows) * per_row, per_row, cell=0.75)
    figure = new_figure(width, 2.6 + len(starts) * height, title)
    curve, *sheets = figure.subplots(1 + len(starts), 1, height_ratios=[2.2] + [height] * len(starts))
    _plot_lengths(curve, angles, classes, longest.tolist(), run.named)
    for start, axes in zip(starts, sheets, strict=True):
        part = slice(start, start + per_row)
        missing = [0, 0, 0, 0, 0, 0, 0, per_row - len(angles[part])]
        shown = [F.pad(one[part], missing, value=1.0) for one in (images, rebuilt) if one is not None]
        heads = [
            f"{angle}°\n{run.named(j)}\n{length:.2f}"
            for angle, j, length in zip(angles[part], classes[part], longest[part].tolist(), strict=True)
        ]
        sheet(axes, torch.cat(shown), per_row, rows=rows, heads=heads)
    sheets[-1].set_xlabel("angle, predicted class, length of its capsule")
    return figure


def _plot_lengths(
    axes: Axes, angles: list[int], classes: Tensor, longest: list[float], named: Callable[[Tensor], str]
) -> None:
    axes.plot(angles, longest, color="lightgray", zorder=1)
    for j in classes.unique():
        points = [(a, v) for a, k, v in zip(angles, classes, longest, strict=True) if k == j]
        axes.scatter(*zip(*points, strict=True), label=f"taken for {named(j)}", color=f"C{j % 10}", zorder=2)
    axes.set(xlabel="angle in degrees", ylabel="length of the\nlongest class capsule", ylim=(0, 1.02))
    axes.set_xticks(range(0, 361, 45))
    above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "frameon": False, "ncols": 10}
    axes.legend(fontsize="small", **above)


def primary(run: LoadedRun, *, image: int = 0, steps: int = 1000) -> Figure:
    """Rebuilt from single primary capsules, the coupling coefficient growing from left to right."""
    system = _capsnet(run, "primary", single=True)
    decoder, largest = primary_decoder(run, system, steps)
    pixels, label = _test_image(run, image)
    u = system.model.encoder(pixels).primary
    coupling, predicted = couplings_to(system, u)
    share = coupling * lengths(u)
    chosen = share[0].topk(min(SHOWN_CAPSULES, share.shape[1])).indices
    values = torch.linspace(0, largest, 10, device=run.device)
    inputs = u.new_zeros(len(chosen), len(values), *u.shape[1:])
    for row, i in enumerate(chosen.tolist()):
        inputs[row, :, i] = values[:, None] * u[0, i]
    rebuilt = decoder(inputs.flatten(0, 1)).unflatten(0, (len(chosen), len(values)))
    shown = torch.cat([pixels.expand(len(chosen), 1, *pixels.shape[1:]), rebuilt], dim=1)
    side = math.isqrt(u.shape[1] // system.model.encoder.primary.capsules)
    rows = [
        f"type {i // side**2}, row {i % side**2 // side}, column {i % side}: {coupling[0, i]:.2f}"
        for i in chosen.tolist()
    ]
    return sheet_figure(
        f"{run.title}\ntest image {image} ({run.named(label)}, taken for {run.named(predicted)}): "
        "rebuilt from single primary capsules",
        shown.flatten(0, 1),
        len(values) + 1,
        rows=rows,
        heads=["image", *(f"{value:.2f}" for value in values.tolist())],
        ylabel=f"primary capsule, and its coupling with class {run.named(predicted)}",
        xlabel="coupling coefficient that the capsule is scaled by",
    )


def turned(image: Tensor, degrees: Tensor) -> Tensor:
    """An image [1, C, H, W] turned counter-clockwise by each of the angles [N]; what comes in is black."""
    angle = torch.deg2rad(degrees.float())
    cosine, sine, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # Where a pixel of the turned image comes from: y grows downwards.
    matrix = torch.stack([cosine, -sine, zero, sine, cosine, zero], dim=1).view(-1, 2, 3)
    places = F.affine_grid(matrix, [len(degrees), *image.shape[1:]], align_corners=False)
    return F.grid_sample(image.expand(len(degrees), -1, -1, -1), places, align_corners=False)


def _cell(heads: list[str]) -> float:
    """How wide images have to be to stand above such words, in inches."""
    return max(CELL, 0.08 * max(len(line) for head in heads for line in head.split("\n")))


def _capsnet(run: LoadedRun, kind: str, *, single: bool = False) -> CapsNet:
    if not isinstance(run.system, CapsNet):
        raise NotApplicableError(f"{kind} does not apply to {run.name}: it rebuilds no image")
    if single:
        _single_labels(run, kind)
    return run.system


def _single_labels(run: LoadedRun, kind: str) -> None:
    if run.system.settings.dataset == "multi-mnist":
        raise NotApplicableError(f"{kind} does not apply to pairs of digits; reconstruct does")


def _test_image(run: LoadedRun, index: int) -> tuple[Tensor, Tensor]:
    """A test image [1, C, H, W] in [0, 1] and its label [1]."""
    dataset = run.dataset
    if not 0 <= index < len(dataset.test_labels):
        raise NotApplicableError(f"--image: got {index}, takes 0 to {len(dataset.test_labels) - 1}")
    return to_unit(dataset.test_images[index : index + 1]), dataset.test_labels[index : index + 1]
