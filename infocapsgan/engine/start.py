"""How a training starts, new or resumed."""

import dataclasses
import math
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
from infocapsgan.engine.device import common_kernels, serving_impl
from infocapsgan.engine.distributed import Processes, synchronise_batch_norm
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.run_directory import Config, RunDirectory, RunError, read_config
from infocapsgan.engine.settings import Settings
from infocapsgan.engine.train_state import TrainState
from infocapsgan.systems.system import System

LEAST_BATCH, LEAST_STEPS = 8, 1500  # of a folder of images; a class code is learned in the first 500 steps


@dataclass
class Training:
    """All that the training loop works with, system and data on the same device."""

    system: System
    dataset: Dataset
    held_out: Dataset | None  # as test images: the weights that are kept have the lowest loss on them
    batches: Batches  # which images make up which step
    state: TrainState
    run: RunDirectory
    seconds: float = 0.0  # how long the run took before it was resumed


def prepare(
    kind: type[System], settings: Settings, run: RunDirectory, processes: Processes, device: torch.device
) -> Training:
    """Makes the system, reads its data, and puts the state of a resumed run back."""
    torch.manual_seed(settings.seed)
    system = kind(settings).to(device)
    dataset = system.load_data().to(device)
    system.class_names = dataset.class_names
    share = system.validation_share
    dataset, held_out = dataset.hold_out(share) if share else (dataset, None)
    batch_size, epochs = sized(kind, settings, len(dataset.train_images))
    system.settings = settings = dataclasses.replace(settings, batch_size=batch_size, epochs=epochs)
    check_batch_size(system, batch_size, processes.world)
    synchronise_batch_norm(system, processes, device)
    if settings.compile:
        system.compile_networks()
    batches = Batches(len(dataset.train_images), batch_size, settings.seed, device)
    state = TrainState(
        system.optimizers,
        ShardedGenerator(settings.seed, device, processes.rank, processes.world),
        precision=settings.precision,
        device=device,
        steps_per_epoch=batches.per_epoch,
        steps=min(epochs * batches.per_epoch, settings.max_steps or sys.maxsize),
        processes=processes,
    )
    training = Training(system, dataset, held_out, batches, state, run)
    shape, names = system.image_shape._asdict(), list(dataset.class_names)
    config = Config(system.name, settings.to_json(), shape, names, dataset.split)
    if settings.resume:
        config = resume(settings.resume, config, training)
    before = config.kernels or {}
    kernels = common_kernels(device, processes, before.get(device.type))
    config = config._replace(kernels={**before, device.type: kernels})
    run.begin(config, state.step, finished=state.step == state.steps)
    if processes.writes:
        print(*report(training), sep="\n", file=sys.stderr)
    return training


def sized(system_class: type[System], settings: Settings, images: int) -> tuple[int, int]:
    """The batch size and the epochs; where they are left to the number of training images, the recipe's.

    But batches are then at most the power of two nearest to a tenth of the images, and steps at least 1,500.
    """
    recipe = {**vars(system_class.Settings()), **system_class.recipes[settings.recipe]}
    tenth = max(LEAST_BATCH, 2 ** round(math.log2(images / 10)))
    batch = settings.batch_size or min(recipe["batch_size"], images, tenth)
    steps = max(LEAST_STEPS, settings.max_steps or 0)
    return batch, settings.epochs or max(recipe["epochs"], math.ceil(steps / max(1, images // batch)))


def check_batch_size(system: System, batch: int, world: int) -> None:
    """Raises ValueError where processes cannot share a batch, or batch norm has too little of it."""
    if batch % world:
        raise ValueError(f"--batch-size: got {batch}, takes a multiple of the {world} processes")
    if batch // world < 2 and any(isinstance(module, _BatchNorm) for module in system.modules()):
        raise ValueError(f"--batch-size: got {batch}, takes at least {2 * world} with batch norm")


def resume(path: Path, here: Config, training: Training) -> Config:
    """Puts the state of the newest intact checkpoint back, and returns what config.json is to hold."""
    state, s, writes = training.state, training.system.settings, training.state.processes.writes
    before, folder = read_config(path), path / "checkpoints"
    _check_split(path, before.split, here.split)
    if training.held_out:
        checkpoint.read_best(folder)  # a damaged one is an error now, not at the first evaluation
    if newest := checkpoint.load_newest(folder, warn=writes):
        _put_back(*newest, training)
    length = f"--epochs {s.epochs}" + (f" and --max-steps {s.max_steps}" if s.max_steps else "")
    if state.step > state.steps:
        ends = f"training of {length} ends after {state.steps}"
        raise RunError(f"--resume: {path} has done {state.step} steps, and {ends}")
    if writes and state.step == state.steps:
        print(f"nothing is left to train: all {state.step} steps of {length} are done", file=sys.stderr)
    return before._replace(settings=here.settings)


def report(training: Training) -> Iterator[str]:
    """What was read, where it goes and how it is computed, and what is not as one may expect."""
    system, dataset, state, s = training.system, training.dataset, training.state, training.system.settings
    (channels, size, number), names = system.image_shape, dataset.class_names
    names = (*names[:8], "…", names[-1]) if len(names) > 10 else names
    classes = f"{number} classes ({', '.join(names)})" if dataset.labelled else "no labels"
    where = f"{s.dataset} in {s.data_dir}" if s.data_dir else s.dataset
    images = f"{len(dataset.train_images)} training, {len(dataset.test_images)} test"
    if training.held_out:
        images += f", {len(training.held_out.test_images)} validation"
    yield f"data: {where}: {images} images of {channels} × {size} × {size}, {classes}"
    steps = f"{state.steps} in all" + (f", of which {state.step} are done" if state.step else "")
    yield f"steps: {state.steps_per_epoch} an epoch with batches of {s.batch_size}, {steps}"
    yield f"run directory: {training.run.path}"
    if any(isinstance(module, (PrimaryCapsules, RoutingCapsules, Squash)) for module in system.modules()):
        impl, reason = serving_impl(s.impl, state.device)
        yield f"capsule kernels: {impl}"
        if reason:
            yield f"warning: the capsules are computed by plain PyTorch, which is slower: {reason}"
    if untrained := system.untrained(state.steps):
        yield f"warning: {untrained}"
    if (n := s.max_steps or 0) > state.steps:
        yield f"warning: --max-steps {n} is not reached: --epochs {s.epochs} ends after {state.steps} steps"


def _put_back(snapshot: checkpoint.Snapshot, path: Path, training: Training) -> None:
    state, training.seconds = training.state, snapshot.numbers["seconds"]
    try:
        checkpoint.restore(snapshot, training.system, state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"--resume: {path} was written by another version of infocapsgan: {error}") from error
    before, here = snapshot.numbers["device"], state.device.type
    if before != here and state.processes.writes:
        moved = f"the run was trained on {before} and goes on on {here}"
        print(f"warning: {moved}: random numbers start anew, which changes results", file=sys.stderr)


def _check_split(path: Path, before: dict[str, Any] | None, here: dict[str, Any] | None) -> None:
    """Raises RunError where the images are not those that the run began with."""
    old, new = ({name for part in (split or {}).values() for name in part} for split in (before, here))
    for what, images in (("were added", sorted(new - old)), ("are missing", sorted(old - new))):
        if images:
            shown = ", ".join(images[:3]) + ", …" * (len(images) > 3)
            raise RunError(f"--resume: since {path} began, images {what}: {shown}")
