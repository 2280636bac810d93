"""From the words of a command to a system and its settings."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from infocapsgan.engine.loaded_run import read_settings
from infocapsgan.engine.run_directory import RunError
from infocapsgan.engine.settings import Settings
from infocapsgan.systems import SYSTEMS
from infocapsgan.systems.system import System

PROGRAM = "python -m infocapsgan.train"
DEFAULT_SYSTEM = "infocapsgan"


def parse(words: Sequence[str]) -> tuple[type[System], Settings]:
    """`[SYSTEM] [options]` → the system's class and its checked settings.

    Ends the program with a message where an option is unknown or its value is out of range.
    """
    if any(word == "--resume" or word.startswith("--resume=") for word in words):
        return _parse_resume(words)
    name, options = _system_name(words)
    system = SYSTEMS[name]
    first = _parser(add_help=False)
    first.add_argument("--recipe", default="tuned")
    first.add_argument("--dataset", default="digits")
    chosen, _ = first.parse_known_args(options)
    known = chosen.recipe in system.recipes and chosen.dataset in _choices(system, "dataset")
    defaults = system.defaults(chosen.recipe, chosen.dataset) if known else system.defaults()
    settings = tyro.cli(
        system.Settings,
        args=list(options),
        default=defaults,
        prog=f"{PROGRAM} {name}",
        description=f"{system.Settings.__doc__}\n\nUsage: {PROGRAM} [{'|'.join(SYSTEMS)}] [options]. "
        f"Defaults are those of --recipe {defaults.recipe} --dataset {defaults.dataset}.",
    )
    return system, settings


def _parse_resume(words: Sequence[str]) -> tuple[type[System], Settings]:
    """Every setting comes from the run; its length alone can be changed.

    The recorded --max-steps would end training before the epochs asked for: --epochs given alone lifts it.
    """
    parser = _parser()
    parser.add_argument("--resume", type=Path, metavar="DIR", required=True, help="run directory to continue")
    parser.add_argument(
        "--epochs",
        type=int,
        help="passes over the training images, in all; alone it lifts the --max-steps of the run",
    )
    parser.add_argument("--max-steps", type=int, help="number of steps, in all")
    named = bool(words) and not words[0].startswith("-")
    given, others = parser.parse_known_args(list(words[named:]))
    if others:
        parser.error(
            f"{' '.join(others)}: cannot be given beside --resume, which takes every setting from the run; "
            "only --epochs and --max-steps can"
        )
    try:
        name, settings = read_settings(given.resume)
    except RunError as error:
        parser.error(f"--resume: {error}")
    if named and words[0] != name:
        parser.error(f"SYSTEM: got {words[0]}, but the run in {given.resume} is one of {name}")
    length = {key: getattr(given, key) for key in ("epochs", "max_steps") if getattr(given, key) is not None}
    if given.epochs is not None:
        length["max_steps"] = given.max_steps
    try:
        settings = dataclasses.replace(settings, **length, resume=given.resume)
    except ValueError as error:
        parser.error(str(error))
    return SYSTEMS[name], settings


def _system_name(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    if not words or words[0].startswith("-"):
        return DEFAULT_SYSTEM, words
    if words[0] not in SYSTEMS:
        _parser().error(f"SYSTEM: got {words[0]}, takes one of {', '.join(SYSTEMS)}")
    return words[0], words[1:]


def _parser(**options) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=PROGRAM, allow_abbrev=False, **options)


def _choices(system: type[System], field: str) -> tuple[str, ...]:
    return system.Settings.__dataclass_fields__[field].type.__args__
