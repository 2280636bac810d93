"""One number of the latent vector varied along each row."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from infocapsgan.engine.loaded_run import LoadedRun
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.settings import Whole
from infocapsgan.metrics.codes import traversal
from infocapsgan.plotting.figures import Sheet, draw_sheet, new_figure, sheet_figure, sheet_size
from infocapsgan.systems import NotApplicableError

ROWS, STEPS = 10, 9


def traverse(run: LoadedRun, *, seed: Whole = 0, code: Whole = 0) -> Figure:
    """One number of the latent varied along each row: continuous codes, or else values of the noise.

    Args:
        seed: of the latent vectors.
        code: class code of all images, where there are no continuous codes.
    """
    system = run.system
    system.require("latents", "traverse")
    rng = ShardedGenerator(seed, run.device)
    if system.continuous_codes:
        return _continuous_codes(run, rng)
    subject = "one value of the noise varied along each row: those that change the image most"
    if system.codes:
        if code >= system.codes:
            raise NotApplicableError(f"--code: got {code}, takes 0 to {system.codes - 1}")
        subject = f"class code {system.code_names[code]}; {subject}"
    base = rng.normal(1, system.noise_dim)

    def images(index: Tensor, values: Tensor) -> Tensor:
        noise = base.repeat(len(index) * len(values), 1)
        place = index.repeat_interleave(len(values))
        noise[torch.arange(len(noise)), place] = values.repeat(len(index))
        return system.generate(system.latents(noise, torch.full_like(place, code)))

    ends = torch.tensor([-3.0, 3.0], device=run.device)
    change = images(torch.arange(system.noise_dim, device=run.device), ends).unflatten(0, (-1, 2))
    change = (change[:, 0] - change[:, 1]).square().flatten(1).sum(dim=1)
    chosen = change.topk(min(ROWS, system.noise_dim)).indices
    values = torch.linspace(-3, 3, STEPS, device=run.device)
    rows, heads = [str(index) for index in chosen.tolist()], [f"{value:g}" for value in values.tolist()]
    labels = "what it is set to (in training a standard normal value)", "which value of the noise"
    sheet = Sheet(images(chosen, values), STEPS, rows, heads, *labels)
    return sheet_figure(f"{run.title}\n{subject}", sheet)


def _continuous_codes(run: LoadedRun, rng: ShardedGenerator) -> Figure:
    system, values = run.system, torch.linspace(-2, 2, STEPS, device=run.device)
    rows, heads = torch.arange(system.codes, device=run.device), [f"{value:g}" for value in values.tolist()]
    sheets = []
    for index in range(system.continuous_codes):
        images = system.generate(traversal(system, index, values, rows, rng))
        labels = f"continuous code {index} (in training from −1 to 1)", system.code_label
        sheets.append(Sheet(images, STEPS, system.code_names, heads, *labels))
    width, height = sheet_size(sheets[0])
    title = f"{run.title}\none continuous code varied along each row"
    figure = new_figure(len(sheets) * width, height + 0.3, title)
    for axes, sheet in zip(figure.subplots(1, len(sheets), squeeze=False)[0], sheets, strict=True):
        draw_sheet(axes, sheet)
    return figure
