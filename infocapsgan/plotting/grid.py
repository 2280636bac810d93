"""Samples of a generator."""

import torch
from matplotlib.figure import Figure

from infocapsgan.engine.loaded_run import LoadedRun
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.settings import Whole
from infocapsgan.plotting.figures import Sheet, sheet_figure

ROWS = COLUMNS = 10


def grid(run: LoadedRun, *, seed: Whole = 0) -> Figure:
    """Samples; a row for each class code where there is one, all rows of the same noise.

    Args:
        seed: of the latent vectors.
    """
    system = run.system
    system.require("latents", "grid")
    rng, title = ShardedGenerator(seed, run.device), f"{run.title}\ngenerated images"
    if not system.codes:
        images = system.generate(system.latents(rng.normal(ROWS * COLUMNS, system.noise_dim)))
        xlabel = f"each of its own noise vector (seed {seed})"
        return sheet_figure(title, Sheet(images, COLUMNS, xlabel=xlabel))
    noise = rng.normal(COLUMNS, system.noise_dim).repeat(system.codes, 1)
    code = torch.arange(system.codes, device=run.device).repeat_interleave(COLUMNS)
    images = system.generate(system.latents(noise, code))
    heads, labels = [str(n + 1) for n in range(COLUMNS)], (f"noise vector (seed {seed})", system.code_label)
    return sheet_figure(title, Sheet(images, COLUMNS, system.code_names, heads, *labels))
