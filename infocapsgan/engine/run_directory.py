"""The directory that holds all that a run leaves behind."""

import json
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from safetensors import SafetensorError

import capsops
from infocapsgan.engine.atomic import atomic_file, remove_unfinished
from infocapsgan.engine.events import EventFile
from infocapsgan.engine.settings import Settings, mismatch
from infocapsgan.plotting.figures import pixels, save_figure, sheet_figure
from infocapsgan.plotting.sheet import Sheet

CONFIG, METRICS, SUMMARY, EVALUATION = "config.json", "metrics.jsonl", "summary.json", "evaluation.json"
LOCK, FOLDERS = ".lock", ("samples", "checkpoints")
FORMAT = 2  # of config.json; version 0.1 wrote none


class RunError(RuntimeError):
    """A run directory cannot be made, read or written, or does not hold what it should."""


class Config(NamedTuple):
    """What config.json holds: all that is needed to load a run without its data."""

    system: str  # its name
    settings: dict[str, Any]  # as Settings.to_json() gives them
    image_shape: dict[str, int]  # channels, size and classes, of the data set
    class_names: list[str]  # in the order of the labels
    split: dict[str, list[str]] | None  # of a folder of images, the relative paths in "train" and "test"
    kernels: dict[str, Any] | None = None  # by type of device, what impl="auto" may take


class RunDirectory(AbstractContextManager["RunDirectory"]):
    """config.json, metrics.jsonl, TensorBoard events, checkpoints/, samples/, curves.png, summary.json.

    It locks a directory that is there. As a context manager it closes its files and releases the lock at the
    end, and removes a directory in which begin() wrote nothing. What goes wrong in writing is a RunError.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoints, self._lock = path, path / "checkpoints", lock_run(path)
        self._files = ExitStack()
        self.rows: list[dict[str, Any]] = []

    @classmethod
    def open(cls, system: str, settings: Settings) -> "RunDirectory":
        """Makes the directory of a new run, or takes that of --resume."""
        if settings.resume:
            return cls(settings.resume)
        with writing(settings.out or Path("runs"), "--out: "):
            path = settings.out or _make_numbered(Path("runs"), f"{system}-{settings.dataset}")
            # Only the lock is in one whose start was killed before its data were read.
            files = [file for file in path.rglob("*") if file.is_file() and file.name != LOCK]
            if files or path.is_file():
                raise RunError(f"--out: {path} is there and not empty; continue a run with --resume {path}")
            for folder in FOLDERS:
                (path / folder).mkdir(parents=True, exist_ok=True)
        return cls(path)

    def begin(self, config: Config, step: int = 0, *, finished: bool = False) -> None:
        """Writes config.json and opens the logs, for a training that goes on after `step`.

        Removes what was logged after it, later checkpoints, which are damaged, what killed processes left
        unfinished, and unless the run is `finished` the results of fewer steps.
        """
        with writing(self.path):
            remove_unfinished(self.path)
            for result in () if finished else (SUMMARY, EVALUATION):
                (self.path / result).unlink(missing_ok=True)
            for saved in self.checkpoints.iterdir():
                if (match := re.fullmatch(r"step-(\d+)", saved.name)) and int(match[1]) > step:
                    shutil.rmtree(saved)
            self.rows = [row for row in read_metrics(self.path) if row["step"] <= step]
            with atomic_file(self.path / METRICS) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            write_config(self.path, config)
            self._metrics = self._files.enter_context((self.path / METRICS).open("a"))
            self._events = self._files.enter_context(closing(EventFile(self.path, step + 1)))

    def __exit__(self, *_: object) -> None:
        try:
            with writing(self.path):
                self._files.close()
        finally:
            if not (self.path / CONFIG).exists():
                with suppress(OSError):  # another process put something there
                    (self.path / LOCK).unlink(missing_ok=True)
                    for folder in (*FOLDERS, ""):
                        (self.path / folder).rmdir()
            self._lock.release()

    def log(self, kind: str, step: int, epoch: float, values: dict[str, float]) -> None:
        """Adds a row to metrics.jsonl and its numbers to TensorBoard; `kind` is a key of curves.SPLITS."""
        row = {"kind": kind, "step": step, "epoch": round(epoch, 4), **values}
        self.rows.append(row)
        with writing(self.path / METRICS):
            self._metrics.write(json.dumps(row) + "\n")
            self._metrics.flush()
            for name, value in values.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def summarise(self, **outcome: Any) -> None:
        """Writes summary.json: what was trained, and `outcome`."""
        name, settings, *_ = read_config(self.path)
        shared = {key: settings[key] for key in ("dataset", "recipe", "seed")}
        write_json(self.path / SUMMARY, {"system": name, **shared, **outcome, "settings": settings})

    def draw(self, step: int, subject: str, sheets: dict[str, Sheet]) -> None:
        """Writes pictures of a step to samples/ and TensorBoard."""
        for name, sheet in sheets.items():
            figure = sheet_figure(f"{subject}, step {step:,}", sheet)
            save_figure(self.path / "samples" / f"{name}-{step:08d}.png", figure)
            self._events.add_image(name, pixels(figure), step)

    def draw_curves(self, figure: Figure) -> None:
        """Writes curves.png anew."""
        save_figure(self.path / "curves.png", figure)


class NoRunDirectory(RunDirectory):
    """The run directory of a process that does not write."""

    def __init__(self) -> None:
        self.path = self.checkpoints = Path()
        self.rows = []

    def log(self, *_: Any, **__: Any) -> None:
        """Does nothing."""

    begin = summarise = draw = draw_curves = __exit__ = log


@contextmanager
def writing(path: Path, option: str = "") -> Iterator[None]:
    """Turns what goes wrong in writing `path`, or a file in it, into a RunError that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        file, reason = getattr(error, "filename", None) or path, getattr(error, "strerror", None) or error
        raise RunError(f"{option}{file} cannot be written: {reason}") from error


def lock_run(path: Path) -> FileLock:
    """Locks a run directory against other trainings, until the lock is released or the process ends."""
    if not path.is_dir():
        raise RunError(f"{path} is not a run directory")
    lock = FileLock(path / LOCK)
    with writing(path):
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RunError(f"{path} is still being trained, by another process") from error
    return lock


def read_config(path: Path) -> Config:
    """What config.json of the run in `path` holds; raises RunError where it is none, damaged or another's."""
    try:
        values = json.loads((path / CONFIG).read_text())
        if not isinstance(values, dict) or not {"system", "settings"} <= values.keys():
            raise ValueError("its config.json names no system and settings")
    except (OSError, RecursionError, ValueError) as error:
        reason = "it has no config.json" if isinstance(error, FileNotFoundError) else error
        raise RunError(f"{path} is not a run directory: {reason}") from error
    if (number := values.get("format", 1)) != FORMAT:
        written = f"written by infocapsgan {values.get('version', '0.1')}, in format {number}"
        raise RunError(f"{path} was {written}; takes format {FORMAT}: use that version, or train it again")
    wrong = [name for name, hint in get_type_hints(Config).items() if mismatch(values.get(name), hint)]
    if wrong or values["image_shape"].keys() != {"channels", "size", "classes"}:
        raise RunError(f"{path / CONFIG} is damaged: {(wrong or ['image_shape'])[0]} is missing or wrong")
    return Config._make(map(values.get, Config._fields))


def write_config(path: Path, config: Config) -> None:
    """Writes config.json to the run directory `path`."""
    write_json(path / CONFIG, {"format": FORMAT, "version": capsops.__version__, **config._asdict()})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without those that are damaged; of all but the last a warning is printed."""
    file = path / METRICS
    rows = [_row(line) for line in file.read_bytes().split(b"\n")[:-1]] if file.exists() else []
    if None in rows[:-1]:
        print(f"warning: {file}: {rows[:-1].count(None)} damaged rows are left out", file=sys.stderr)
    return [row for row in rows if row is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    """The row in a line; None where it is cut, garbled, or not of the numbers that log() writes."""
    with suppress(RecursionError, TypeError, ValueError):
        row = json.loads(line)
        if has_types(row, **dict.fromkeys([*row, "epoch"], int | float) | {"kind": str, "step": int}):
            return row
    return None


def has_types(values: Any, **types: Any) -> bool:
    """Whether `values` is a dict with these keys, and the value of each is of this type."""
    return isinstance(values, dict) and all(isinstance(values.get(key), kind) for key, kind in types.items())


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file, whole or not at all; raises RunError where it cannot be written."""
    with writing(path), atomic_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    packages = {package.__name__: package.__version__ for package in (torch, np, capsops)}
    return {"python": platform.python_version(), **packages}


def device_name(device: torch.device) -> str:
    """The device in words, as summary.json has it."""
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu


def _make_numbered(parent: Path, name: str) -> Path:
    """Makes parent/0001-name, or that of the next number that is free."""
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        taken = [int(match[1]) for path in parent.iterdir() if (match := re.match(r"(\d{4,})-", path.name))]
        path = parent / f"{max(taken, default=0) + 1:04d}-{name}"
        with suppress(FileExistsError):  # another process took the number meanwhile
            path.mkdir()
            return path
