"""Straight lines from one latent vector to another."""

import torch
from matplotlib.figure import Figure

from infocapsgan.engine.loaded_run import LoadedRun
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.settings import Whole
from infocapsgan.plotting.figures import Sheet, sheet_figure

ROWS, STEPS = 10, 11


def morph(run: LoadedRun, *, seed: Whole = 0) -> Figure:
    """Straight lines from one latent to another: from a class code to the next, else between two samples.

    Args:
        seed: of the latent vectors.
    """
    system, rng = run.system, ShardedGenerator(seed, run.device)
    system.require("generate", "morph")
    if system.codes and not system.why_not("latents"):
        noise = rng.normal(1, system.noise_dim).repeat(system.codes, 1)
        code = torch.arange(system.codes, device=run.device)
        starts, ends = (system.latents(noise, (code + n) % system.codes) for n in (0, 1))
        names = system.code_names
        rows = [f"{name} → {other}" for name, other in zip(names, names[1:] + names[:1], strict=True)]
        ylabel = f"{system.code_label}, the noise is the same"
    else:
        real = run.dataset.test_images if system.why_not("latents") else None
        starts, ends = system.random_latents(2 * ROWS, rng, images=real).chunk(2)
        rows = [str(row + 1) for row in range(ROWS)]
        ylabel = "two latent vectors" if real is None else "latent vectors of two test images"
    along = torch.linspace(0, 1, STEPS, device=run.device)
    latents = torch.lerp(starts[:, None], ends[:, None], along[:, None])
    heads = [f"{share:.1f}" for share in along.tolist()]
    images = system.generate(latents.flatten(0, 1))
    sheet = Sheet(images, STEPS, rows, heads, xlabel="share of the way", ylabel=ylabel)
    return sheet_figure(f"{run.title}\nstraight lines from one latent vector to another", sheet)
