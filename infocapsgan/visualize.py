"""Draws what a trained system does: `python -m infocapsgan.visualize RUN KIND [options]`."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from infocapsgan.data import DataError
from infocapsgan.engine import loaded_run as trained
from infocapsgan.engine.run_directory import RunError
from infocapsgan.evaluate import NotApplicableError, add_run_options
from infocapsgan.plotting import capsules, generated, mistakes, training
from infocapsgan.plotting.sheet import save_figure, save_gif

KINDS: dict[str, Callable] = {
    "grid": generated.grid,
    "traverse": generated.traverse,
    "morph": generated.morph,
    "tweak": capsules.tweak,
    "reconstruct": capsules.reconstruct,
    "rotate": capsules.rotate,
    "primary": capsules.primary,
    "mistakes": mistakes.mistakes,
    "animate": training.animate,
    "curves": training.curves,
}
GIF_MILLISECONDS = 400


def main() -> None:
    """The command line."""
    parser = _parser()
    given = vars(parser.parse_args())
    run, kind, out = (given.pop(name) for name in ("run", "kind", "out"))
    if out and (out.suffix != f".{suffix(kind)}" or out.is_dir()):
        parser.error(f"--out: got {out}, takes a file that ends in .{suffix(kind)}")
    places = {name: given.pop(name) for name in ("device", "data_dir")}
    try:
        run = trained.load(run, **places)
        run.warn()
        path = visualize(run, kind, out, **given)
    except (DataError, RunError, NotApplicableError) as error:
        sys.exit(f"error: {error}")
    print(f"written to {path}")


def visualize(run: trained.LoadedRun, kind: str, out: Path | None = None, **options) -> Path:
    """Writes a picture of KINDS and returns its path.

    Args:
        found: what is drawn.
        kind: which picture.
        out: the file; None is RUN/pictures/KIND.png, or .gif for an animation.
        options: of the kind.

    Raises:
        NotApplicableError: there is no such picture of this system.
    """
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
    """What the file of a picture ends in."""
    return "gif" if kind == "animate" else "png"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m infocapsgan.visualize", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    made = {}
    for name, function in KINDS.items():
        summary = function.__doc__.splitlines()[0]
        made[name] = kinds.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        made[name].add_argument(
            "--out", type=Path, metavar="FILE", help=f"(default: RUN/pictures/{name}.{suffix(name)})"
        )
        add_run_options(made[name])

    def add(option: str, names: str, default: int, text: str, least: int = 0) -> None:
        for name in names.split():
            made[name].add_argument(
                option,
                type=_at_least(least),
                metavar="N",
                default=default,
                help=f"{text} (default: {default})",
            )

    add("--seed", "grid traverse morph", 0, "of the latent vectors")
    add("--code", "traverse", 0, "class code of all images, where there are no continuous codes")
    add("--image", "tweak rotate primary", 0, "number of the test image, from 0 on")
    add("--degrees", "rotate", 15, "from one angle to the next", 1)
    add("--images", "reconstruct", 10, "how many test images", 1)
    add("--images", "mistakes", 60, "how many test images at most", 1)
    add("--steps", "primary", 1000, "of training of the decoder, 128 images each", 1)
    made["animate"].add_argument(
        "--pictures", metavar="NAME", help="which of those in samples/ (default: samples, or the first)"
    )
    made["curves"].add_argument("--metric", metavar="NAME", help="one number alone, against epochs")
    made["curves"].add_argument(
        "--beside", type=Path, nargs="+", metavar="RUN", default=(), help="runs whose metric is drawn too"
    )
    made["curves"].add_argument(
        "--reach", type=float, nargs="+", metavar="VALUE", default=(), help="tell when each run reached them"
    )
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def parse(word: str) -> int:
        if not word.isdecimal() or int(word) < least:
            raise argparse.ArgumentTypeError(f"got {word}, takes a whole number of at least {least}")
        return int(word)

    return parse


if __name__ == "__main__":
    main()
