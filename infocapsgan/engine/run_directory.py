"""The directory that holds all that a run leaves behind."""

import json
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

import capsops
from infocapsgan.engine.atomic import atomic_file
from infocapsgan.engine.settings import Settings
from infocapsgan.plotting.figures import pixels, save_figure, sheet_figure
from infocapsgan.plotting.sheet import Sheet

SUMMARY, EVALUATION = "summary.json", "evaluation.json"


class RunError(RuntimeError):
    """A run directory cannot be made, or does not hold what it should."""


class Run:
    """config.json, metrics.jsonl, TensorBoard events, checkpoints/, samples/, curves.png, summary.json.

    As a context manager it closes its files at the end and gives the directory free.

    Args:
        path: the directory, which create() made.
        lock: what alone() gave.
        resume_step: where training goes on; what was logged after it is dropped.
    """

    def __init__(self, path: Path, lock: FileLock, resume_step: int = 0) -> None:
        self.path, self._lock = path, lock
        self.rows = [row for row in read_metrics(path) if row["step"] <= resume_step]
        with atomic_file(path / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self._metrics = (path / "metrics.jsonl").open("a")
        self._board = SummaryWriter(str(path), purge_step=resume_step + 1)

    @classmethod
    def create(cls, system: str, settings: Settings) -> "Run":
        """Makes the directory of a new run and writes its config.json.

        Raises:
            RunError: --out names a directory that is not empty.
        """
        path = settings.out or _numbered(Path("runs"), f"{system}-{settings.dataset}")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(
                f"--out: {path} is there already and not empty; continue a run with --resume {path}"
            )
        for folder in ("samples", "checkpoints"):
            (path / folder).mkdir(parents=True)
        lock = alone(path)
        write_json(path / "config.json", {"system": system, "settings": settings.to_json()})
        return cls(path, lock)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()
        self._board.close()
        self._lock.release()

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def log(self, kind: str, step: int, epoch: float, values: dict[str, float]) -> None:
        """Adds a row to metrics.jsonl and its numbers to TensorBoard; `kind` is "train" or "evaluation"."""
        row = {"kind": kind, "step": step, "epoch": round(epoch, 4), **values}
        self.rows.append(row)
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def draw(self, step: int, subject: str, sheets: dict[str, Sheet]) -> None:
        """Writes pictures of a step to samples/ and TensorBoard."""
        for name, sheet in sheets.items():
            figure = sheet_figure(f"{subject}, step {step:,}", sheet)
            save_figure(self.path / "samples" / f"{name}-{step:08d}.png", figure)
            self._board.add_image(name, pixels(figure), step, dataformats="HWC")

    def draw_curves(self, figure: Figure) -> None:
        """Writes curves.png anew."""
        save_figure(self.path / "curves.png", figure)


class SilentRun:
    """The run of a process that does not write."""

    path = Path()

    def log(self, *_: Any) -> None:
        """Nothing."""

    draw = draw_curves = __exit__ = log

    def __enter__(self) -> "SilentRun":
        return self


def alone(path: Path) -> FileLock:
    """Holds a run directory against other trainings, until the lock is released or the process ends.

    Raises:
        RunError: there is no run, or it is still being trained.
    """
    if not path.is_dir():
        raise RunError(f"{path} is not a run directory")
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(f"{path} is still being trained, by another process") from error
    return lock


def read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """The name of the system and the settings of the run in `path`.

    Raises:
        RunError: there is no run.
    """
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError as error:
        raise RunError(f"{path} is not a run directory: it has no config.json") from error
    except (NotADirectoryError, ValueError) as error:
        raise RunError(f"{path} is not a run directory ({error})") from error
    if not isinstance(config, dict) or not {"system", "settings"} <= config.keys():
        raise RunError(f"{path} is not a run directory: its config.json names no system and settings")
    return config["system"], config["settings"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that a killed run left unfinished is no row."""
    file = path / "metrics.jsonl"
    lines = file.read_text().split("\n") if file.exists() else []
    return [json.loads(line) for line in lines[:-1]]


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "capsops": capsops.__version__,
    }


def device_name(device: torch.device) -> str:
    """The device in words, as summary.json has it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _numbered(parent: Path, name: str) -> Path:
    """parent/0001-name, or the next number that is free."""
    taken = [int(found[1]) for path in parent.glob("*") if (found := re.match(r"(\d{4,})-", path.name))]
    return parent / f"{max(taken, default=0) + 1:04d}-{name}"
