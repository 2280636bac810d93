"""Measures a trained system: `python -m infocapsgan.evaluate RUN [options]`.

Writes RUN/evaluation.json: on a CPU the same at every call with as many threads. What is measured, in groups:

classification   systems trained with labels: accuracy, error, margin loss, squared error of reconstructions
                 from the predicted class, confusion matrix; of MultiMNIST also the error of pairs
clustering       systems with a class code: unsupervised accuracy (clusters are matched with labels on the
                 training split), NMI, ARI, confusion matrix
generation       systems with a generator: Fréchet distance to the test images, precision and recall, in the
                 features of a classifier trained on the same data (not Inception; see metrics/features.py)
codes            InfoGAN on digits: rank correlation of slant, width of stroke and digit with each code
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from infocapsgan.data import DataError
from infocapsgan.engine.loaded_run import LoadedRun, load
from infocapsgan.engine.run_directory import EVALUATION, RunError, device_name, versions, write_json
from infocapsgan.metrics import GROUPS
from infocapsgan.systems import NotApplicableError

SAMPLES = 10_000


def main() -> None:
    """The command line."""
    args = _parser().parse_args()
    try:
        run = load(args.run, device=args.device, data_dir=args.data_dir)
        run.warn()
        result = evaluate(run, args.metrics, samples=args.samples)
        write_json(args.run / EVALUATION, result)
    except (DataError, RunError, NotApplicableError) as error:
        sys.exit(f"error: {error}")
    for name, value in result["metrics"].items():
        print(f"{name.replace('_', ' '):32}{value:.4f}")
    print(f"written to {args.run / EVALUATION}")


def evaluate(
    run: LoadedRun, groups: Sequence[str] | None = None, *, samples: int = SAMPLES
) -> dict[str, Any]:
    """The metrics of `groups` of a trained system, as evaluation.json holds them.

    Args:
        run: the run.
        groups: of infocapsgan.metrics.GROUPS; None: all that apply.
        samples: how many images are generated and compared with as many test images, or with all.

    Raises:
        NotApplicableError: a group does not apply to this system.
    """
    dataset, settings = run.dataset, run.system.settings
    reasons = {name: group.why_not(run.system, dataset) for name, group in GROUPS.items()}
    applicable = [name for name, reason in reasons.items() if not reason]
    if not applicable:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise NotApplicableError(f"no metric applies to this run of {run.name}: {why}")
    for name in groups or ():
        if reasons[name]:
            raise NotApplicableError(
                f"--metrics: {name} does not apply to this run of {run.name}: {reasons[name]}; "
                f"it takes {' and '.join(applicable)}"
            )
    result: dict[str, Any] = {
        "system": run.name,
        "dataset": settings.dataset,
        "recipe": settings.recipe,
        "seed": settings.seed,
        "weights": run.weights.checkpoint.name,
        "step": run.weights.step,
        "metrics": {},
    }
    with torch.no_grad():
        for name in groups or applicable:
            metrics, details = GROUPS[name].measure(run.system, dataset, samples)
            result["metrics"] |= metrics
            if details:
                result[name] = details
    return result | {"device": device_name(run.device), "versions": versions()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m infocapsgan.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=GROUPS,
        help="groups of metrics, the file then holds these only (default: all that apply)",
    )
    parser.add_argument(
        "--samples",
        type=_at_least_100,
        default=SAMPLES,
        metavar="N",
        help="images to generate, no more than there are test images (default: %(default)s)",
    )
    add_run_options(parser)
    return parser


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that reads a run."""
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where the data are, if they were moved")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)"
    )


def _at_least_100(word: str) -> int:
    if not word.isdecimal() or int(word) < 100:
        raise argparse.ArgumentTypeError(f"got {word}, takes a whole number of at least 100")
    return int(word)


if __name__ == "__main__":
    main()
