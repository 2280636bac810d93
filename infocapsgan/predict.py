"""Classifies images with a trained system: `python -m infocapsgan.predict RUN IMAGE… [--json]`."""

import argparse
import json
import sys
from pathlib import Path

from infocapsgan.data import DataError
from infocapsgan.engine.loaded_run import LoadedRun, load
from infocapsgan.engine.run_directory import RunError
from infocapsgan.systems import NotApplicableError

LIKELIEST = 3  # classes in the table


def main() -> None:
    """The command line."""
    args = _parser().parse_args()
    try:
        run = load(args.run, device=args.device)
        run.warn()
        rows = predict(run, args.images)
    except (DataError, RunError, NotApplicableError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(rows, indent=2) if args.json else table(rows))


def predict(run: LoadedRun, paths: list[Path]) -> list[dict]:
    """For each image its `image` (the path), `class` (its name), and `probabilities` by class name."""
    found = run.predict(paths)
    probabilities = [dict(zip(found.class_names, row, strict=True)) for row in found.probabilities.tolist()]
    return [
        {"image": str(path), "class": name, "probabilities": row}
        for path, name, row in zip(paths, found.names, probabilities, strict=True)
    ]


def table(rows: list[dict]) -> str:
    """A line for each image: its class, and the likeliest classes with their probabilities."""
    widths = [max(len(row[key]) for row in rows) for key in ("image", "class")]
    lines = []
    for row in rows:
        ranked = sorted(row["probabilities"].items(), key=lambda item: -item[1])[:LIKELIEST]
        shown = "  ".join(f"{name} {value:.3f}" for name, value in ranked)
        lines.append(f"{row['image']:{widths[0]}}  {row['class']:{widths[1]}}  ({shown})")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m infocapsgan.predict",
        description="Classifies images with a trained system. Images are read as those of --dataset folder: "
        "the middle square, resized, in the channels that the system takes. A system that learned without "
        "labels predicts class codes, by the names of the classes that they were matched with.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("images", type=Path, metavar="IMAGE", nargs="+", help="image files")
    parser.add_argument("--json", action="store_true", help="print JSON, with the probability of every class")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    main()
