"""What a run left behind, ready to be measured and drawn."""

import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from infocapsgan.data import Dataset
from infocapsgan.data.class_names import class_names
from infocapsgan.engine import checkpoint
from infocapsgan.engine.device import local_device
from infocapsgan.engine.run_directory import RunError, read_config
from infocapsgan.engine.settings import Settings
from infocapsgan.systems import SYSTEMS
from infocapsgan.systems.system import System


class Weights(NamedTuple):
    """Which of a run's checkpoints holds the weights to use, and of which step they are."""

    checkpoint: Path
    step: int


@dataclass(frozen=True)
class LoadedRun:
    """A trained system in evaluation mode.

    Attributes:
        path: the run directory.
        name: of the system.
        system: with the weights of the last checkpoint, or of the best where the run held images out.
        weights: where those weights are from.
        device: where they are.
    """

    path: Path
    name: str
    system: System
    weights: Weights
    device: torch.device

    @property
    def subject(self) -> str:
        """What was trained, in words: for the title of a picture."""
        s = self.system.settings
        return f"{self.name} on {s.dataset} (recipe {s.recipe}, seed {s.seed})"

    @property
    def title(self) -> str:
        """The subject and how far its training had come."""
        chosen = "best weights, " if self.weights.checkpoint.name == checkpoint.BEST else ""
        return f"{self.subject}, {chosen}step {self.weights.step:,}"

    def warn(self) -> None:
        """Says on standard error what of it is not trained yet."""
        if untrained := self.system.untrained(self.weights.step):
            print(f"warning: {untrained}", file=sys.stderr)

    def named(self, labels: Tensor) -> str:
        """The class of a label, in words; of several labels, joined by +."""
        names = class_names(self.system.settings.dataset, self.system.settings.data_dir)
        return "+".join(names[label] for label in labels.flatten().tolist())

    @cached_property
    def dataset(self) -> Dataset:
        """The data that the system was trained on, cropped to the middle, on its device."""
        return self.system.load_data().to(self.device).centred()


def load(path: Path, *, device: str = "auto", data_dir: Path | None = None) -> LoadedRun:
    """Reads the system of the run in `path`.

    Args:
        path: a run directory.
        device: auto, cpu or cuda; auto takes a GPU where there is one.
        data_dir: where the data are now, if not where the run found them.

    Raises:
        RunError: there is no run, it has no checkpoint, another version of the package wrote it, or there is
            no such device.
        DataError: the directory of images that the system was trained on is not there.
    """
    name, settings = read_settings(path)
    weights = _weights(path)
    system = SYSTEMS[name](replace(settings, data_dir=data_dir) if data_dir else settings)
    try:
        system.load_state_dict(load_file(weights.checkpoint / checkpoint.WEIGHTS))
    except RuntimeError as error:
        raise RunError(f"the weights in {weights.checkpoint} do not fit this system: {error}") from error
    where = local_device(device)
    return LoadedRun(path, name, system.to(where).eval().requires_grad_(False), weights, where)


def read_settings(path: Path) -> tuple[str, Settings]:
    """The name of the system of the run in `path`, and its settings.

    Raises:
        RunError: there is no run, or another version of the package wrote it.
    """
    name, values, *_ = read_config(path)
    if name not in SYSTEMS:
        raise RunError(f"{path} holds a run of {name!r}, which is none of {', '.join(SYSTEMS)}")
    try:
        return name, SYSTEMS[name].Settings.from_json(values)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} was written by another version of infocapsgan: {error}") from error


def _weights(path: Path) -> Weights:
    folder = path / "checkpoints"
    if best := checkpoint.read_best(folder):
        return Weights(folder / checkpoint.BEST, best["step"])
    saved = checkpoint.checkpoints(folder)
    if not saved:
        raise RunError(f"{path} has no checkpoint yet; train on with --resume {path}")
    return Weights(saved[-1], int(saved[-1].name.removeprefix("step-")))
