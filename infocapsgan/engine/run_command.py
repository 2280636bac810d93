"""What the commands that read a run have in common."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infocapsgan.data import DataError
from infocapsgan.engine.command_line import program
from infocapsgan.engine.loaded_run import LoadedRun, load
from infocapsgan.engine.run_directory import RunError
from infocapsgan.engine.settings import Range
from infocapsgan.systems import NotApplicableError

DEVICE: dict[str, Any] = {"choices": ("auto", "cpu", "cuda"), "default": "auto", "help": "(default: auto)"}
DATA_DIR: dict[str, Any] = {"type": Path, "metavar": "DIR", "help": "where the data are, if they were moved"}
"""Of the options --device and --data-dir, for add_argument()."""


def run_parser(command: str, about: str | None) -> argparse.ArgumentParser:
    """The parser of a command whose first argument is a run directory; `about` is its help, as it stands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(program(command), None, about, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    return parser


def whole(limits: Range) -> Callable[[str], int]:
    """The `type` of an option that takes whole numbers."""

    def parse(word: str) -> int:
        if not word.isdecimal() or not limits.low <= int(word) <= limits.high:
            raise argparse.ArgumentTypeError(f"got {word}, takes a whole number of {limits}")
        return int(word)

    return parse


@contextmanager
def loaded(path: Path, **where: Any) -> Iterator[LoadedRun]:
    """The run, as load() reads it; an error that a user can correct ends the program with one line."""
    try:
        run = load(path, **where)
        run.warn()
        yield run
    except (DataError, RunError, NotApplicableError) as error:
        sys.exit(f"error: {error}")
