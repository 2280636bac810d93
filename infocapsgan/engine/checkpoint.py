"""The whole state of a training, in memory and on disk."""

import json
import re
import shutil
import sys
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from infocapsgan.engine.atomic import atomic_file, atomic_folder
from infocapsgan.engine.run_directory import RunError, has_types, writing
from infocapsgan.engine.train_state import TrainState
from infocapsgan.systems.system import System

WEIGHTS, TRAINING, NUMBERS = "weights.safetensors", "training.safetensors", "state.json"
NAME, BEST = "step-{:08d}", "best"
RNG, TORCH_RNG = "generator.draw", "generator.torch"
UNREADABLE = (OSError, RecursionError, SafetensorError, ValueError)  # what reading a damaged file may raise


class Snapshot(NamedTuple):
    """Everything that the next steps depend on, copied."""

    weights: dict[str, Tensor]  # parameters and buffers of the system
    tensors: dict[str, Tensor]  # of the optimisers, and states of the generators of random numbers
    numbers: dict[str, Any]  # step, type of the device, the optimisers' and gradient scalers' plain numbers


def capture(system: System, state: TrainState) -> Snapshot:
    """A copy of the state as it is now."""
    tensors = {RNG: state.rng.generator.get_state(), TORCH_RNG: torch.get_rng_state()}
    saved = {name: optimizer.state_dict() for name, optimizer in state.optimizers.items()}
    for name, states in saved.items():
        for index, values in states["state"].items():
            tensors |= {f"optimizer.{name}.{index}.{key}": value for key, value in values.items()}
    numbers = {
        "step": state.step,
        "device": state.device.type,
        "optimizers": {name: states["param_groups"] for name, states in saved.items()},
        "scalers": {name: scaler.state_dict() for name, scaler in state.scalers.items()},
    }
    return Snapshot(_copied(system.state_dict()), _copied(tensors), json.loads(json.dumps(numbers)))


def restore(snapshot: Snapshot, system: System, state: TrainState) -> None:
    """Puts a captured state back; on another type of device random numbers start anew, from seed and step."""
    system.load_state_dict(snapshot.weights)
    state.step = snapshot.numbers["step"]
    for name, optimizer in state.optimizers.items():
        values: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for key, value in snapshot.tensors.items():
            if key.startswith(f"optimizer.{name}."):
                index, field = key.removeprefix(f"optimizer.{name}.").split(".")
                values[int(index)][field] = value.clone()
        optimizer.load_state_dict({"state": values, "param_groups": snapshot.numbers["optimizers"][name]})
    for name, scaler in state.scalers.items():
        scaler.load_state_dict(snapshot.numbers["scalers"][name])
    if snapshot.numbers["device"] == state.device.type:
        state.rng.generator.set_state(snapshot.tensors[RNG])
        torch.set_rng_state(snapshot.tensors[TORCH_RNG])
    else:
        seed = (system.settings.seed * 1_000_003 + state.step) % (1 << 63)
        state.rng.generator.manual_seed(seed)
        torch.manual_seed(seed)


def save(folder: Path, snapshot: Snapshot, *, seconds: float) -> Path:
    """Writes a state, with the seconds so far, to `folder`/step-…, and keeps the last two there.

    What is there of the same step is the same state: it stays, unless it is damaged.
    """
    path = folder / NAME.format(snapshot.numbers["step"])
    with suppress(RunError):
        load(path)
        return path
    with writing(path):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} was removed while the run was training")
        with atomic_folder(path) as temporary:
            save_file(snapshot.weights, temporary / WEIGHTS)
            save_file(snapshot.tensors, temporary / TRAINING)
            (temporary / NUMBERS).write_text(json.dumps(snapshot.numbers | {"seconds": seconds}, indent=1))
        for old in checkpoints(folder)[:-2]:
            shutil.rmtree(old)
    return path


def save_best(folder: Path, system: System, step: int, loss: float) -> None:
    """Writes the weights to `folder`/best unless those there have at most this validation loss.

    They and their loss are in one file: it replaces the last one in a single step, so there always is one.
    """
    if (before := read_best(folder)) and before["validation_loss"] <= loss:
        return
    state = json.dumps({"step": step, "validation_loss": loss})
    with writing(folder / BEST):
        (folder / BEST).mkdir(exist_ok=True)
        with atomic_file(folder / BEST / WEIGHTS) as temporary:
            save_file(_copied(system.state_dict()), temporary, {"state": state})


def read_best(folder: Path) -> dict[str, Any] | None:
    """The step and the validation loss of what save_best() kept; None where there is nothing."""
    path = folder / BEST / WEIGHTS
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {}).get("state", "{}"))
    except UNREADABLE as error:
        raise RunError(f"{path} is damaged: {error}") from error
    if not has_types(state, step=int, validation_loss=int | float):
        raise RunError(f"{path} was written by another version of infocapsgan: it does not say its step")
    return state


def load_best(folder: Path, system: System) -> None:
    """Puts the weights back that save_best() kept."""
    system.load_state_dict(load_file(folder / BEST / WEIGHTS))


def load_newest(folder: Path, *, warn: bool = True) -> tuple[Snapshot, Path] | None:
    """The newest checkpoint in `folder` that is not damaged, and its path; None where there is none at all.

    With `warn`, newer ones that are damaged are named on standard error; where all are, a RunError names one.
    """
    damaged: list[RunError] = []
    for path in reversed(checkpoints(folder)):
        try:
            snapshot = load(path)
        except RunError as error:
            damaged.append(error)
        else:
            for reason in damaged if warn else ():
                print(f"warning: {reason}; {path.name} takes its place", file=sys.stderr)
            return snapshot, path
    if damaged:
        raise RunError(f"{damaged[0]}; no other checkpoint is intact") from damaged[0]
    return None


def load(path: Path) -> Snapshot:
    """Reads what save() wrote, without unpickling; raises RunError where it is damaged."""
    try:
        numbers = json.loads((path / NUMBERS).read_text())
        if not has_types(numbers, step=int, device=str, seconds=int | float, optimizers=dict, scalers=dict):
            raise ValueError(f"{NUMBERS} lacks a value, or has one of a wrong type")
        snapshot = Snapshot(load_file(path / WEIGHTS), load_file(path / TRAINING), numbers)
        if path.name != NAME.format(numbers["step"]) or not {RNG, TORCH_RNG} <= snapshot.tensors.keys():
            raise ValueError("it is of another step, or lacks the state of the random numbers")
    except UNREADABLE as error:
        raise RunError(f"the checkpoint {path} is damaged: {error}") from error
    return snapshot


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
