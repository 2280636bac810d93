"""How a training starts, new or resumed."""

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from capsops.nn import PrimaryCapsules, RoutingCapsules, Squash
from infocapsgan.data import Dataset
from infocapsgan.data.batches import Batches
from infocapsgan.engine import checkpoint
from infocapsgan.engine.device import serving_impl
from infocapsgan.engine.distributed import Processes, synchronise_batch_norm
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.run_directory import Config, NoRunDirectory, RunDirectory, RunError, read_config
from infocapsgan.engine.settings import Settings
from infocapsgan.engine.train_state import TrainState
from infocapsgan.systems import SYSTEMS
from infocapsgan.systems.system import System

LEAST_BATCH, LEAST_STEPS = 8, 1500  # of a folder of images; a class code is learned in the first 500 steps


@dataclass
class Training:
    """All that the training loop works with.

    Attributes:
        system: what is trained, on its device.
        dataset: on the same device.
        held_out: images, as test images, on which the weights that are kept have the lowest loss.
        batches: which images make up which step.
        state: where training stands, and what it changes weights with.
        run: where everything is written.
        seconds: how long the run took before it was resumed.
    """

    system: System
    dataset: Dataset
    held_out: Dataset | None
    batches: Batches
    state: TrainState
    run: RunDirectory | NoRunDirectory
    seconds: float = 0.0


def open_run(
    system_class: type[System], settings: Settings, processes: Processes
) -> RunDirectory | NoRunDirectory:
    """The run directory, before anything else is done: a new one, or the one of --resume."""
    if not processes.writes:
        return NoRunDirectory()
    if settings.resume:
        return RunDirectory(settings.resume)
    return RunDirectory.create(_name(system_class), settings)


def prepare(
    system_class: type[System],
    settings: Settings,
    run: RunDirectory | NoRunDirectory,
    processes: Processes,
    device: torch.device,
) -> Training:
    """Makes the system, reads its data, and puts the state of a resumed run back."""
    torch.manual_seed(settings.seed)
    system = system_class(settings).to(device)
    dataset = system.load_data().to(device)
    held_out = None
    if system.validation_share:
        dataset, held_out = dataset.hold_out(system.validation_share)
    system.settings = settings = sized(system_class, settings, len(dataset.train_images))
    check_batch_size(system, processes)
    synchronise_batch_norm(system, processes, device)
    if settings.compile:
        system.compile_networks()
    batches = Batches(len(dataset.train_images), settings.batch_size, settings.seed, device)
    state = TrainState(
        system.optimizers,
        ShardedGenerator(settings.seed, device, processes.rank, processes.world),
        precision=settings.precision,
        device=device,
        steps_per_epoch=batches.per_epoch,
        steps=min(settings.epochs * batches.per_epoch, settings.max_steps or sys.maxsize),
        processes=processes,
    )
    training = Training(system, dataset, held_out, batches, state, run)
    config = _config(system_class, system, dataset)
    if settings.resume:
        config = resume(settings.resume, config, training)
    run.begin(config, state.step, finished=state.step == state.steps)
    if processes.writes:
        for line in report(training):
            print(line, file=sys.stderr)
    return training


def sized(system_class: type[System], settings: Settings, images: int) -> Settings:
    """The settings with the batch size and the epochs that were left to the number of training images.

    The batch size is that of the recipe, but at most a power of two near a tenth of the images; the epochs are
    those of the recipe, but at least as many as 1,500 steps need.
    """
    recipe = {**vars(system_class.Settings()), **system_class.recipes[settings.recipe]}
    batch, epochs = settings.batch_size, settings.epochs
    if batch is None:
        tenth = torch.tensor(images / 10).log2().round().exp2().int().item()
        batch = min(recipe["batch_size"], images, max(LEAST_BATCH, tenth))
    if epochs is None:
        steps = max(LEAST_STEPS, settings.max_steps or 0)
        epochs = max(recipe["epochs"], -(-steps // max(1, images // batch)))
    return dataclasses.replace(settings, batch_size=batch, epochs=epochs)


def check_batch_size(system: System, processes: Processes) -> None:
    """Raises ValueError where the processes cannot share a batch, or have too little of it for batch norm."""
    batch, world = system.settings.batch_size, processes.world
    if batch % world:
        raise ValueError(f"--batch-size: got {batch}, takes a multiple of the {world} processes")
    if batch // world < 2 and any(isinstance(module, _BatchNorm) for module in system.modules()):
        each = f" for each of the {world} processes" if world > 1 else ""
        raise ValueError(f"--batch-size: got {batch}, takes at least 2{each} with batch norm")


def resume(path: Path, here: Config, training: Training) -> Config:
    """Puts the state of the newest intact checkpoint back, and returns what config.json is to hold.

    Raises:
        RunError: no checkpoint is intact or fits, the images are others, or the run has more steps already.
    """
    system, state, writes = training.system, training.state, training.state.processes.writes
    before = read_config(path)
    _check_split(path, before.split, here.split)
    folder = path / "checkpoints"
    if training.held_out:
        checkpoint.read_best(folder)  # a damaged one is an error now, not at the first evaluation
    if newest := checkpoint.load_newest(folder, warn=writes):
        training.seconds = _put_back(*newest, system, state)
    length = f"--epochs {system.settings.epochs}"
    length += f" and --max-steps {system.settings.max_steps}" if system.settings.max_steps else ""
    if state.step > state.steps:
        raise RunError(
            f"--resume: {path} has done {state.step} steps, and training of {length} ends after {state.steps}"
        )
    if writes and state.step == state.steps:
        print(f"nothing is left to train: all {state.step} steps of {length} are done", file=sys.stderr)
    if writes:
        checkpoint.remove_after(folder, state.step)
    return before._replace(settings=here.settings)


def report(training: Training) -> Iterator[str]:
    """What was read, where it goes and how it is computed, and what is not as one may expect."""
    system, dataset, state, s = training.system, training.dataset, training.state, training.system.settings
    shape = system.image_shape
    names = list(getattr(dataset, "class_names", ()))
    shown = f" ({', '.join(names if len(names) <= 10 else [*names[:8], '…', names[-1]])})" if names else ""
    classes = f"{shape.classes} classes{shown}" if dataset.labelled else "no labels"
    where = f"{s.dataset} in {s.data_dir}" if s.data_dir else s.dataset
    held_out = f"{len(training.held_out.test_images)} validation, " if training.held_out else ""
    yield (
        f"data: {where}: {len(dataset.train_images)} training, {held_out}{len(dataset.test_images)} test images "
        f"of {shape.channels} × {shape.size} × {shape.size}, {classes}"
    )
    yield (
        f"steps: {training.batches.per_epoch} an epoch with batches of {s.batch_size}, {state.steps} in all"
        + (f", of which {state.step} are done" if state.step else "")
    )
    yield f"run directory: {training.run.path}"
    if any(isinstance(module, (PrimaryCapsules, RoutingCapsules, Squash)) for module in system.modules()):
        impl, reason = serving_impl(s.impl, state.device)
        yield f"capsule kernels: {impl}"
        if reason:
            yield f"warning: the capsules are computed by plain PyTorch, which is slower: {reason}"
    if untrained := system.untrained(state.steps):
        yield f"warning: {untrained}"
    whole = s.epochs * training.batches.per_epoch
    if (s.max_steps or 0) > whole:
        yield f"warning: --max-steps {s.max_steps} is not reached: --epochs {s.epochs} ends after {whole} steps"


def _put_back(snapshot: checkpoint.Snapshot, path: Path, system: System, state: TrainState) -> float:
    """Puts a checkpoint back, and returns the seconds that the run had taken."""
    try:
        checkpoint.restore(snapshot, system, state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"--resume: {path} was written by another version of infocapsgan: {error}") from error
    before, here = snapshot.numbers["device"], state.device.type
    if before != here and state.processes.writes:
        print(
            f"warning: the run was trained on {before} and goes on on {here}: random numbers start anew, so "
            "its results differ from those of a run that stayed there",
            file=sys.stderr,
        )
    return snapshot.numbers["seconds"]


def _config(system_class: type[System], system: System, dataset: Dataset) -> Config:
    return Config(
        _name(system_class),
        system.settings.to_json(),
        system.image_shape._asdict(),
        list(getattr(dataset, "class_names", ())),
        getattr(dataset, "split", None),
    )


def _check_split(path: Path, before: dict[str, Any] | None, here: dict[str, Any] | None) -> None:
    """Raises RunError where the images are not those that the run began with."""
    old, new = (
        {f"{part}: {image}" for part, images in (split or {}).items() for image in images}
        for split in (before, here)
    )
    changes = [
        f"{len(images)} {what} ({', '.join(sorted(images)[:3])}{', …' if len(images) > 3 else ''})"
        for what, images in (("added", new - old), ("missing", old - new))
        if images
    ]
    if changes:
        raise RunError(f"--resume: the images are not those that {path} began with: {'; '.join(changes)}")


def _name(system_class: type[System]) -> str:
    return next(name for name, known in SYSTEMS.items() if known is system_class)
