"""Draws a picture of a trained system: `python -m infocapsgan.visualize RUN KIND [options]`."""

import argparse
import inspect
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docstring_parser
import torch

from infocapsgan.data import DataError
from infocapsgan.engine.loaded_run import LoadedRun, load
from infocapsgan.engine.run_directory import RunError
from infocapsgan.engine.settings import Range
from infocapsgan.evaluate import add_run_options
from infocapsgan.plotting import KINDS, import_kinds
from infocapsgan.plotting.figures import save_figure, save_gif
from infocapsgan.systems import NotApplicableError

GIF_MILLISECONDS = 400


def main() -> None:
    """The command line."""
    import_kinds()
    parser = _parser()
    options = vars(parser.parse_args())
    run, kind, out = (options.pop(name) for name in ("run", "kind", "out"))
    if out and (out.suffix != f".{suffix(kind)}" or out.is_dir()):
        parser.error(f"--out: got {out}, takes a file that ends in .{suffix(kind)}")
    places = {name: options.pop(name) for name in ("device", "data_dir")}
    try:
        loaded = load(run, **places)
        loaded.warn()
        path = visualize(loaded, kind, out, **options)
    except (DataError, RunError, NotApplicableError) as error:
        sys.exit(f"error: {error}")
    print(f"written to {path}")


def visualize(run: LoadedRun, kind: str, out: Path | None = None, **options: Any) -> Path:
    """Writes a picture and returns its path.

    Args:
        run: the run.
        kind: one of infocapsgan.plotting.KINDS.
        out: the file; None is RUN/pictures/KIND.png, or .gif for an animation.
        options: of the kind.

    Raises:
        NotApplicableError: there is no such picture of this system.
    """
    import_kinds()
    path = out or run.path / "pictures" / f"{kind}.{suffix(kind)}"
    with torch.no_grad():
        picture = KINDS[kind](run, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(picture, list):
        save_gif(path, picture, GIF_MILLISECONDS)
    else:
        save_figure(path, picture)
    return path


def suffix(kind: str) -> str:
    """The ending of a picture's file."""
    return "gif" if kind == "animate" else "png"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m infocapsgan.visualize", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, function in KINDS.items():
        documentation = docstring_parser.parse(function.__doc__ or "")
        summary = documentation.short_description
        kind = kinds.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        kind.add_argument(
            "--out", type=Path, metavar="FILE", help=f"(default: RUN/pictures/{name}.{suffix(name)})"
        )
        add_run_options(kind)
        helps = {parameter.arg_name: parameter.description for parameter in documentation.params}
        hints = typing.get_type_hints(function, include_extras=True)
        for parameter in list(inspect.signature(function).parameters.values())[1:]:
            _add_option(kind, parameter, hints[parameter.name], helps[parameter.name] or "")
    return parser


def _add_option(
    parser: argparse.ArgumentParser, parameter: inspect.Parameter, hint: Any, description: str
) -> None:
    """The option of a kind's keyword: Annotated[int, Range], a string, or a sequence of paths or numbers."""
    option = f"--{parameter.name.replace('_', '-')}"
    if hasattr(hint, "__metadata__"):
        shown = f"{description} (default: {parameter.default})"
        parser.add_argument(
            option, type=_whole(hint.__metadata__[0]), metavar="N", default=parameter.default, help=shown
        )
        return
    kind = typing.get_args(hint)[0]
    many: dict[str, Any] = {} if kind is str else {"nargs": "+"}
    metavar = {str: "NAME", Path: "RUN", float: "VALUE"}[kind]
    parser.add_argument(
        option, type=kind, metavar=metavar, default=parameter.default, help=description, **many
    )


def _whole(limits: Range) -> Callable[[str], int]:
    def parse(word: str) -> int:
        if not word.isdecimal() or not limits.low <= int(word) <= limits.high:
            raise argparse.ArgumentTypeError(f"got {word}, takes a whole number of {limits}")
        return int(word)

    return parse


if __name__ == "__main__":
    main()
