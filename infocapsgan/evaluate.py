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

from collections.abc import Sequence
from typing import Any

import torch

from infocapsgan.engine.loaded_run import LoadedRun
from infocapsgan.engine.run_command import DATA_DIR, DEVICE, loaded, run_parser, whole
from infocapsgan.engine.run_directory import EVALUATION, device_name, versions, write_json
from infocapsgan.engine.settings import Range
from infocapsgan.metrics import GROUPS
from infocapsgan.systems import NotApplicableError

SAMPLES = 10_000


def main() -> None:
    parser = run_parser("evaluate", __doc__)
    of_metrics = "groups of metrics, the file then holds these only (default: all that apply)"
    of_samples = (
        "images to generate, at least 100, or as many as there are test images (default: %(default)s)"
    )
    parser.add_argument("--metrics", nargs="+", choices=GROUPS, help=of_metrics)
    parser.add_argument("--samples", type=whole(Range(100)), default=SAMPLES, metavar="N", help=of_samples)
    parser.add_argument("--data-dir", **DATA_DIR)
    parser.add_argument("--device", **DEVICE)
    args = parser.parse_args()
    with loaded(args.run, device=args.device, data_dir=args.data_dir) as run:
        result = evaluate(run, args.metrics, samples=args.samples)
        write_json(args.run / EVALUATION, result)
    for name, value in result["metrics"].items():
        print(f"{name.replace('_', ' '):32}{value:.4f}")
    print(f"written to {args.run / EVALUATION}")


def evaluate(run: LoadedRun, groups: Sequence[str] | None = None, samples: int = SAMPLES) -> dict[str, Any]:
    """The metrics of `groups` of a trained system, or of all that apply, as evaluation.json holds them.

    So many samples are generated and compared with as many test images, or with all.
    """
    dataset, s = run.dataset, run.system.settings
    reasons = {name: group.why_not(run.system, dataset) for name, group in GROUPS.items()}
    applicable = [name for name, reason in reasons.items() if not reason]
    if not applicable:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise NotApplicableError(f"no metric applies to this run of {run.name}: {why}")
    for name in groups or ():
        if reason := reasons[name]:
            why = f"{name} does not apply to this run of {run.name}: {reason}"
            raise NotApplicableError(f"--metrics: {why}; it takes {' and '.join(applicable)}")
    result: dict[str, Any] = {"system": run.name, "dataset": s.dataset, "recipe": s.recipe, "seed": s.seed}
    result |= {"weights": run.weights.checkpoint.name, "step": run.weights.step, "metrics": {}}
    with torch.no_grad():
        for name in groups or applicable:
            metrics, details = GROUPS[name].measure(run.system, dataset, samples)
            result["metrics"] |= metrics
            result |= {name: details} if details else {}
    return result | {"device": device_name(run.device), "versions": versions()}


if __name__ == "__main__":
    main()
