"""Draws a picture of a trained system: `python -m infocapsgan.visualize RUN KIND [options]`."""

import inspect
import typing
from pathlib import Path
from typing import Any

import docstring_parser
import torch

from infocapsgan.engine.loaded_run import LoadedRun
from infocapsgan.engine.run_command import DATA_DIR, DEVICE, loaded, run_parser, whole
from infocapsgan.engine.run_directory import writing
from infocapsgan.engine.settings import option_name
from infocapsgan.plotting import kinds
from infocapsgan.plotting.figures import save_figure, save_gif


def main() -> None:
    parser = run_parser("visualize", __doc__)
    subparsers = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, function in kinds().items():
        documentation = docstring_parser.parse(function.__doc__ or "")
        summary = documentation.short_description
        add = subparsers.add_parser(name, help=summary, description=summary, allow_abbrev=False).add_argument
        add("--out", type=Path, metavar="FILE", help=f"(default: RUN/pictures/{name}.{suffix(name)})")
        add("--data-dir", **DATA_DIR)
        add("--device", **DEVICE)
        hints = typing.get_type_hints(function, include_extras=True)
        about = {documented.arg_name: documented.description for documented in documentation.params}
        for option, parameter in list(inspect.signature(function).parameters.items())[1:]:
            add(option_name(option), **_option(hints[option], parameter.default, about[option]))
    options = vars(parser.parse_args())
    run, kind, out = (options.pop(name) for name in ("run", "kind", "out"))
    if out and (out.suffix != f".{suffix(kind)}" or out.is_dir()):
        parser.error(f"--out: got {out}, takes a file that ends in .{suffix(kind)}")
    with loaded(run, device=options.pop("device"), data_dir=options.pop("data_dir")) as trained:
        path = visualize(trained, kind, out, **options)
    print(f"written to {path}")


def visualize(run: LoadedRun, kind: str, out: Path | None = None, **options: Any) -> Path:
    """Writes a picture of one of plotting.kinds(), where `out` is None to RUN/pictures; returns its path."""
    path = out or run.path / "pictures" / f"{kind}.{suffix(kind)}"
    with torch.no_grad():
        picture = kinds()[kind](run, **options)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        (save_gif if isinstance(picture, list) else save_figure)(path, picture)
    return path


def suffix(kind: str) -> str:
    """The ending of a picture's file."""
    return "gif" if kind == "animate" else "png"


def _option(hint: Any, default: Any, about: str | None) -> dict[str, Any]:
    """Of a kind's keyword: Annotated[int, Range], a string, or a sequence of paths or numbers."""
    if hasattr(hint, "__metadata__"):
        shown = f"{about} (default: {default})"
        return {"type": whole(hint.__metadata__[0]), "metavar": "N", "default": default, "help": shown}
    kind = typing.get_args(hint)[0]
    metavar = {str: "NAME", Path: "RUN", float: "VALUE"}[kind]
    many = {} if kind is str else {"nargs": "+"}
    return {"type": kind, "metavar": metavar, "default": default, "help": about, **many}


if __name__ == "__main__":
    main()
