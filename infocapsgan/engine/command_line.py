"""From the words of a command to a system and its settings."""

import argparse
import dataclasses
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro
from docstring_parser import parse_from_object

from infocapsgan.engine.loaded_run import read_settings
from infocapsgan.engine.run_directory import RunError
from infocapsgan.engine.settings import Settings
from infocapsgan.systems import SYSTEMS, System

DEFAULT_SYSTEM = "infocapsgan"
GROUPS = {
    "data": ("dataset", "data_dir", "image_size"),
    "run directory": ("out", "resume", "log_every", "evaluate_every", "checkpoint_every"),
    "machine": ("device", "impl", "precision", "compile"),
}
"""Headings in --help for options that all systems have; the others stand under "training"."""
FOLDER = """\
With --dataset folder the images are in --data-dir, laid out in one of three ways:
  a.png b.jpg …                     images without labels
  cats/a.png … dogs/b.png …         a folder for each class
  train/… test/…                    both with images, or both with a folder for each class;
                                    without them a fifth of the images is the test split"""


def program(command: str) -> str:
    """How the user called a command: `infocapsgan train`, or `python -m infocapsgan.train`."""
    script = f"infocapsgan {command}"
    return script if sys.argv[0] == script else f"python -m infocapsgan.{command}"


def parse(words: Sequence[str]) -> tuple[type[System], Settings]:
    """`[SYSTEM] [options]` → the system's class and its settings; ends the program where one is wrong."""
    named = bool(words) and not words[0].startswith("-")
    name, options = words[0] if named else DEFAULT_SYSTEM, list(words[named:])
    if any(word.partition("=")[0] == "--resume" for word in options):
        return _parse_resume(name if named else "", options)
    if name not in SYSTEMS:
        _parser().error(f"SYSTEM: got {name}, takes one of {', '.join(SYSTEMS)}")
    system = SYSTEMS[name]
    first = _parser(add_help=False)
    first.add_argument("--recipe", default="tuned")
    first.add_argument("--dataset", default="digits")
    chosen, _ = first.parse_known_args(options)
    try:
        defaults = system.defaults(chosen.recipe, chosen.dataset)
    except ValueError:  # tyro says which of the two is wrong, and what it takes
        defaults = system.defaults()
    about = system.Settings.__doc__ if named else _overview()
    groups: Any = tyro.cli(
        _grouped(defaults),
        args=options,
        prog=" ".join([program("train"), *words[:named]]),
        description=f"{about}\n\nUsage: {program('train')} [{'|'.join(SYSTEMS)}] [options]\n\nThe defaults "
        f"below are those of {name} --recipe {defaults.recipe} --dataset {defaults.dataset}.",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
    )
    values = {name: value for group in vars(groups).values() for name, value in vars(group).items()}
    try:
        return system, system.Settings(**values)
    except ValueError as error:
        _parser().error(str(error))


def _parse_resume(name: str, words: list[str]) -> tuple[type[System], Settings]:
    """Every setting comes from the run, except its length and where the data are now."""
    parser = _parser()
    parser.add_argument("--resume", type=Path, metavar="DIR", required=True, help="run directory to continue")
    parser.add_argument("--epochs", type=int, help="in all; without --max-steps it lifts that of the run")
    parser.add_argument("--max-steps", type=int, help="number of steps, in all")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where the data are now, if they moved")
    options, others = parser.parse_known_args(words)
    if others:
        taken = "which takes every setting from the run; only --epochs, --max-steps and --data-dir can"
        parser.error(f"{' '.join(others)}: cannot be given beside --resume, {taken}")
    changed = {key: value for key, value in vars(options).items() if value is not None and key != "resume"}
    try:
        system, settings = resumed(options.resume, **changed)
    except RunError as error:
        parser.error(f"--resume: {error}")
    except ValueError as error:
        parser.error(str(error))
    if name and name != system.name:
        parser.error(f"SYSTEM: got {name}, but the run in {options.resume} is one of {system.name}")
    return system, settings


def resumed(path: Path, **changed: Any) -> tuple[type[System], Settings]:
    """The system of the run in `path` and its settings, with the length or the folder of the data changed."""
    if other := changed.keys() - {"epochs", "max_steps", "data_dir"}:
        raise TypeError(f"{', '.join(sorted(other))}: cannot be changed when a run is resumed")
    name, settings = read_settings(path)
    if "epochs" in changed:  # the recorded max_steps would end training before them
        changed.setdefault("max_steps", None)
    return SYSTEMS[name], dataclasses.replace(settings, **changed, resume=path)


def _grouped(defaults: Settings) -> type:
    """A dataclass of dataclasses, one for each heading in --help, with fields and values of `defaults`."""
    kind = type(defaults)
    owners = [owner for owner in reversed(kind.__mro__) if dataclasses.is_dataclass(owner)]
    hints = get_type_hints(kind, include_extras=True)
    help_of = {doc.arg_name: doc.description for owner in owners for doc in parse_from_object(owner).params}
    headings = {name: heading for heading, names in GROUPS.items() for name in names}
    groups: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for name in (field.name for field in dataclasses.fields(kind)):
        owner = next(owner for owner in owners if name in owner.__dataclass_fields__)
        group = owner.__name__.removesuffix("Settings"), str(owner.__doc__)
        if owner is Settings:
            group = headings.get(name, "training"), ""
        hint: Any = Annotated[hints[name], tyro.conf.arg(help=help_of[name])]
        groups[group].append((name, hint, dataclasses.field(default=getattr(defaults, name))))
    fields: list[Any] = []
    for (heading, about), options in groups.items():
        group_type = dataclasses.make_dataclass("Options", options)
        hint = Annotated[group_type, tyro.conf.arg(name=heading, help=about)]
        fields.append((f"group_{len(fields)}", hint, dataclasses.field(default_factory=group_type)))
    return dataclasses.make_dataclass("Groups", fields)


def _overview() -> str:
    """The systems in a line each, and how a folder of images is laid out."""
    first_lines = {name: str(system.Settings.__doc__).splitlines()[0] for name, system in SYSTEMS.items()}
    lines = (f"  {name:13}{line.partition(': ')[2]}\n" for name, line in first_lines.items())
    details = f"`{program('train')} SYSTEM --help` lists the options of one."
    return f"Trains a system:\n{''.join(lines)}\n{details}\n\n{FOLDER}"


def _parser(**options: Any) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=program("train"), allow_abbrev=False, **options)
