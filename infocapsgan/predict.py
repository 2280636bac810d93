"""Classifies images with a trained system: `python -m infocapsgan.predict RUN IMAGE… [--json]`.

Images are read as those of --dataset folder: the middle square, resized, in the channels that the system
takes. A system that learned without labels predicts class codes, by the names of the classes that they were
matched with. Capsule classifiers' probabilities are lengths of capsules, which do not add up to 1.
"""

import json
from pathlib import Path

from infocapsgan.engine.loaded_run import LoadedRun
from infocapsgan.engine.run_command import DEVICE, loaded, run_parser


def main() -> None:
    parser = run_parser("predict", __doc__)
    parser.add_argument("images", type=Path, metavar="IMAGE", nargs="+", help="image files")
    parser.add_argument("--json", action="store_true", help="print JSON, with the probability of every class")
    parser.add_argument("--device", **DEVICE)
    args = parser.parse_args()
    with loaded(args.run, device=args.device) as run:
        rows = predict(run, args.images)
    print(json.dumps(rows, indent=2) if args.json else table(rows))


def predict(run: LoadedRun, paths: list[Path]) -> list[dict]:
    """For each image its `image` (the path), `class` (its name), and `probabilities` by class name."""
    predictions = run.predict(paths)
    names, rows = predictions.class_names, predictions.probabilities.tolist()
    return [
        {"image": str(path), "class": name, "probabilities": dict(zip(names, row, strict=True))}
        for path, name, row in zip(paths, predictions.names, rows, strict=True)
    ]


def table(rows: list[dict]) -> str:
    """A line for each image: its class, and the three likeliest classes with their probabilities."""
    widths = [max(len(row[key]) for row in rows) for key in ("image", "class")]
    lines = []
    for row in rows:
        ranked = sorted(row["probabilities"].items(), key=lambda item: -item[1])[:3]
        shown = "  ".join(f"{name} {value:.3f}" for name, value in ranked)
        lines.append(f"{row['image']:{widths[0]}}  {row['class']:{widths[1]}}  ({shown})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
