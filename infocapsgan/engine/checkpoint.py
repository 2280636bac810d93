"""The whole state of a training, in memory and on disk."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from infocapsgan.engine.atomic import atomic_file, atomic_folder
from infocapsgan.engine.run_directory import RunError
from infocapsgan.engine.train_state import TrainState
from infocapsgan.systems.system import System

WEIGHTS, TRAINING, NUMBERS = "weights.safetensors", "training.safetensors", "state.json"
BEST = "best"


@dataclass
class Snapshot:
    """Everything that the next steps depend on, copied.

    Attributes:
        weights: parameters and buffers of the system.
        tensors: of the optimisers, states of the generators of random numbers.
        numbers: the step, the type of the device, and the optimisers' and gradient scalers' plain numbers.
    """

    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


def capture(system: System, state: TrainState) -> Snapshot:
    """A copy of the state as it is now."""
    tensors = {
        "generator.draw": state.rng.generator.get_state(),
        "generator.torch": torch.get_rng_state(),
    }
    groups = {}
    for name, optimizer in state.optimizers.items():
        saved = optimizer.state_dict()
        groups[name] = saved["param_groups"]
        for index, values in saved["state"].items():
            tensors |= {f"optimizer.{name}.{index}.{key}": value for key, value in values.items()}
    numbers = {
        "step": state.step,
        "device": state.device.type,
        "optimizers": groups,
        "scalers": {name: scaler.state_dict() for name, scaler in state.scalers.items()},
    }
    return Snapshot(_copied(system.state_dict()), _copied(tensors), json.loads(json.dumps(numbers)))


def restore(snapshot: Snapshot, system: System, state: TrainState) -> None:
    """Puts a captured state back."""
    system.load_state_dict(snapshot.weights)
    state.step = snapshot.numbers["step"]
    for name, optimizer in state.optimizers.items():
        values: dict[int, dict[str, Tensor]] = {}
        for key, value in snapshot.tensors.items():
            if key.startswith(f"optimizer.{name}."):
                index, _, field = key.removeprefix(f"optimizer.{name}.").partition(".")
                values.setdefault(int(index), {})[field] = value.clone()
        optimizer.load_state_dict({"state": values, "param_groups": snapshot.numbers["optimizers"][name]})
    for name, scaler in state.scalers.items():
        scaler.load_state_dict(snapshot.numbers["scalers"][name])
    state.rng.generator.set_state(snapshot.tensors["generator.draw"])
    torch.set_rng_state(snapshot.tensors["generator.torch"])


def save(folder: Path, snapshot: Snapshot, **numbers: float) -> Path:
    """Writes a state to `folder`/step-…, whole or not at all, and keeps the last two there.

    What is there of the same step is the same state and stays.

    Args:
        folder: of all checkpoints of a run.
        snapshot: what capture() gave.
        numbers: what else is to be found there again, beside the state.
    """
    path = folder / f"step-{snapshot.numbers['step']:08d}"
    with atomic_folder(path, keep=True) as temporary:
        save_file(snapshot.weights, temporary / WEIGHTS)
        save_file(snapshot.tensors, temporary / TRAINING)
        (temporary / NUMBERS).write_text(json.dumps(snapshot.numbers | numbers, indent=1))
    for old in checkpoints(folder)[:-2]:
        shutil.rmtree(old)
    return path


def save_best(folder: Path, system: System, step: int, loss: float) -> None:
    """Writes the weights to `folder`/best unless those there have at most this validation loss.

    The only weights that are ever chosen: by held-out training images, in systems trained with labels. They
    and their loss are in one file: it takes the place of the last at one stroke, so there is always a best.
    """
    before = read_best(folder)
    if before and before["validation_loss"] <= loss:
        return
    (folder / BEST).mkdir(exist_ok=True)
    state = json.dumps({"step": step, "validation_loss": loss})
    with atomic_file(folder / BEST / WEIGHTS) as temporary:
        save_file(_copied(system.state_dict()), temporary, {"state": state})


def read_best(folder: Path) -> dict[str, Any] | None:
    """The step and the validation loss of what save_best() kept; None where there is nothing.

    Raises:
        RunError: another version of the package wrote it.
    """
    path = folder / BEST / WEIGHTS
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if "state" not in metadata:
        raise RunError(f"{path} was written by another version of infocapsgan: it does not say its step")
    return json.loads(metadata["state"])


def load_best(folder: Path, system: System) -> None:
    """Puts the weights back that save_best() kept."""
    system.load_state_dict(load_file(folder / BEST / WEIGHTS))


def load(path: Path) -> Snapshot:
    """Reads what save() wrote; nothing is unpickled."""
    numbers = json.loads((path / NUMBERS).read_text())
    return Snapshot(load_file(path / WEIGHTS), load_file(path / TRAINING), numbers)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
