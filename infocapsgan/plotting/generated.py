"""What a generator draws: samples, one number of the latent varied, lines from one latent to another."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from infocapsgan.engine.loaded_run import LoadedRun
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.evaluate import NotApplicableError, no_generator
from infocapsgan.plotting.sheet import new_figure, sheet, sheet_figure, sheet_size
from infocapsgan.systems import InfoCapsGAN, InfoGAN, Mimic
from infocapsgan.systems.gan import LatentGAN
from infocapsgan.systems.system import System

ROWS = COLUMNS = 10


def grid(run: LoadedRun, *, seed: int = 0) -> Figure:
    """Samples; a row for each class code where there is one, all rows of the same noise."""
    system = _with_generator(run, "grid")
    rng = ShardedGenerator(seed, run.device)
    title = f"{run.title}\nimages that the generator draws"
    if isinstance(system, (InfoCapsGAN, InfoGAN)):
        classes = system.image_shape.classes
        noise = rng.normal(COLUMNS, system.settings.noise_dim).repeat(classes, 1)
        code = torch.arange(classes, device=run.device).repeat_interleave(COLUMNS)
        return sheet_figure(
            title,
            system.generate(system.latent(noise, code)),
            COLUMNS,
            rows=[str(j) for j in range(classes)],
            heads=[str(number) for number in range(1, COLUMNS + 1)],
            ylabel="class code",
            xlabel=f"noise vector (seed {seed})",
        )
    if isinstance(system, Mimic):
        raise NotApplicableError(
            "grid: the latents of mimic are taken from real images; its copies of them are the picture "
            "reconstruct"
        )
    latents = system.random_latents(ROWS * COLUMNS, rng, run.dataset.train_images)
    return sheet_figure(
        title, system.generate(latents), COLUMNS, xlabel=f"each from a latent vector of its own (seed {seed})"
    )


def traverse(run: LoadedRun, *, seed: int = 0, code: int = 0) -> Figure:
    """One number of the latent varied along each row: continuous codes, or else values of the noise."""
    system = _with_generator(run, "traverse")
    rng = ShardedGenerator(seed, run.device)
    if isinstance(system, InfoGAN) and system.settings.continuous_codes:
        return _continuous_codes(run, system, rng)
    if isinstance(system, Mimic):
        raise NotApplicableError(
            "traverse: the latents of mimic are taken from real images, none of their numbers has a range"
        )
    noise_dim = system.noise_dim if isinstance(system, LatentGAN) else system.settings.noise_dim
    base = rng.normal(1, noise_dim)
    subject = "one value of the noise varied along each row: those that change the image most"

    def drawn(index: Tensor, values: Tensor) -> Tensor:
        noise = base.repeat(len(index) * len(values), 1)
        place = index.repeat_interleave(len(values))
        noise[torch.arange(len(noise)), place] = values.repeat(len(index))
        if not isinstance(system, (InfoCapsGAN, InfoGAN)):
            return system.generate(noise)
        return system.generate(system.latent(noise, torch.full_like(place, code)))

    if isinstance(system, (InfoCapsGAN, InfoGAN)):
        classes = system.image_shape.classes
        if not 0 <= code < classes:
            raise NotApplicableError(f"--code: got {code}, takes 0 to {classes - 1}")
        subject = f"class code {code}; {subject}"
    ends = torch.tensor([-3.0, 3.0], device=run.device)
    change = drawn(torch.arange(noise_dim, device=run.device), ends).unflatten(0, (-1, 2))
    change = (change[:, 0] - change[:, 1]).square().flatten(1).sum(dim=1)
    chosen = change.topk(min(ROWS, noise_dim)).indices
    values = torch.linspace(-3, 3, 9, device=run.device)
    return sheet_figure(
        f"{run.title}\n{subject}",
        drawn(chosen, values),
        len(values),
        rows=[str(index) for index in chosen.tolist()],
        heads=[f"{value:g}" for value in values.tolist()],
        ylabel="which value of the noise",
        xlabel="what it is set to (trained on a standard normal)",
    )


def _continuous_codes(run: LoadedRun, system: InfoGAN, rng: ShardedGenerator) -> Figure:
    values = torch.linspace(-2, 2, 9, device=run.device)
    classes, codes = system.image_shape.classes, system.settings.continuous_codes
    rows = torch.arange(classes, device=run.device)
    width, height = sheet_size(classes * len(values), len(values))
    title = f"{run.title}\none continuous code varied along each row"
    figure = new_figure(codes * width, height + 0.3, title)
    for index, axes in enumerate(figure.subplots(1, codes, squeeze=False)[0]):
        axes.set_title(f"continuous code {index}", fontsize="medium")
        sheet(
            axes,
            system.generate(system.traversal(index, values, rows, rng)),
            len(values),
            rows=[str(j) for j in range(classes)],
            heads=[f"{value:g}" for value in values.tolist()],
            ylabel="class code",
            xlabel=f"continuous code {index} (trained from −1 to 1)",
        )
    return figure


def morph(run: LoadedRun, *, seed: int = 0) -> Figure:
    """Straight lines from one latent to another: from a class code to the next, else between two samples."""
    system = _with_generator(run, "morph")
    starts, ends, rows, ylabel = _line_ends(run, system, ShardedGenerator(seed, run.device))
    along = torch.linspace(0, 1, 11, device=run.device)
    latents = torch.lerp(starts[:, None], ends[:, None], along[:, None])
    return sheet_figure(
        f"{run.title}\nstraight lines from one latent vector to another",
        system.generate(latents.flatten(0, 1)),
        len(along),
        rows=rows,
        heads=[f"{share:.1f}" for share in along.tolist()],
        ylabel=ylabel,
        xlabel="share of the way",
    )


def _line_ends(
    run: LoadedRun, system: System, rng: ShardedGenerator
) -> tuple[Tensor, Tensor, list[str], str]:
    if isinstance(system, (InfoCapsGAN, InfoGAN)):
        classes = system.image_shape.classes
        noise = rng.normal(1, system.settings.noise_dim).repeat(classes, 1)
        code = torch.arange(classes, device=run.device)
        rows = [f"{j} → {(j + 1) % classes}" for j in range(classes)]
        ends = system.latent(noise, code), system.latent(noise, (code + 1) % classes)
        return *ends, rows, "class code, same noise"
    images = run.dataset.test_images
    latents = system.random_latents(2 * ROWS, rng, images)
    names = "last capsules of two test images" if isinstance(system, Mimic) else "two latent vectors"
    return latents[:ROWS], latents[ROWS:], [str(row + 1) for row in range(ROWS)], names


def _with_generator(run: LoadedRun, kind: str) -> LatentGAN | InfoCapsGAN | InfoGAN | Mimic:
    if reason := no_generator(run.system):
        raise NotApplicableError(f"{kind} does not apply to this run of {run.name}: {reason}")
    return run.system
