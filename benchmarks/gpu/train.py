"""Seconds per MNIST epoch of CapsNet, by each kernel of capsops and by the same model routed by einsum.

python -m benchmarks.gpu.train [--plan] [--out DIR]

For each precision and batch size the models are first compared, then each trains whole epochs in turns,
through the steps of the training loop (loading, augmentation, update, checks), with nothing written. The
routing layer is timed by itself too, on the tensors of the step. Then the profiler says what a step consists
of, kernel by kernel, and at one setting both models run with compiled networks. Writes train-DEVICE.json and
train-profile.txt.
"""

import argparse
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import capsops
from benchmarks import machine, peers
from benchmarks.check import relative_error
from benchmarks.gpu.device import describe_device
from benchmarks.passes import FORWARD_BACKWARD, run
from benchmarks.report import markdown_table, parts_line
from benchmarks.rows import RESULTS, Row, Target, save
from benchmarks.system_step import EinsumCapsules, SystemStep, clock, kernels, parts, profiled
from capsops import dispatch
from infocapsgan import data
from infocapsgan.data import Dataset
from infocapsgan.systems import CapsNet

SUITE = "training"
EINSUM = "einsum"
BOUNDS = {"fp32": 5e-3, "bf16": 5e-2}  # of the class capsules' difference, with convolutions in TF32
EPOCH_SECONDS, ROUTING_SHARE = 2.0, 0.1  # to be reached on an H200
EPOCHS, WARM_UP_STEPS, PROFILED_STEPS, ROUTING_CALLS = 2, 20, 20, 50


@dataclass(frozen=True)
class Case:
    """One setting at which all models are timed."""

    precision: str
    batch: int
    compiled: bool = False

    def __str__(self) -> str:
        compiled = ", compiled networks" if self.compiled else ""
        return f"MNIST epoch, B={self.batch} {self.precision}{compiled}"


def main() -> None:
    args = _parser().parse_args()
    cases = [Case(precision, batch) for precision in args.precisions for batch in args.batch_sizes]
    if args.compile:
        cases.append(Case(args.precisions[-1], args.batch_sizes[0], compiled=True))
    if args.plan:
        print(plan(cases, args))
        return
    impls = args.impl or available(args.device)
    torch.backends.cudnn.benchmark = True  # as the training command does
    began, device = time.monotonic(), torch.device(args.device)
    dataset = data.load("mnist").to(device)
    dataset = dataset.head(args.images) if args.images else dataset
    rows, failures = [], []
    header = {
        **machine.provenance(["python", "-m", "benchmarks.gpu.train", *sys.argv[1:]]),
        "device": describe_device(device),
        "ceiling": product_ceiling(device),
        "failures": failures,
    }
    path = args.out / f"train-{machine.slug(header['device']['model'])}.json"
    for case in cases:
        if time.monotonic() - began > args.seconds:
            failures.append(f"{case}: not begun, {args.seconds:g} s were over")
        else:
            found, failed = measure(case, impls, dataset, args)
            rows += found
            failures += failed
            print(*(f"{row.case}, {row.impl}: {row.seconds:.3f} s" for row in found), sep="\n", flush=True)
        save(path, header, rows)
    print("", *markdown_table(rows), "", *map(parts_line, rows), f"written to {path}", sep="\n")
    if failures:
        sys.exit("\n".join(failures))


def measure(
    case: Case, impls: list[str], dataset: Dataset, args: argparse.Namespace
) -> tuple[list[Row], list[str]]:
    """The rows of a case, one for each implementation, and what failed."""
    models, failures = {}, []
    for name in [EINSUM, *impls]:
        with reported(f"{case}, {name}", failures), settled(name):
            models[name] = Model(name, case, dataset, args.width)
            models[name].compare(models[EINSUM])
            clock(models[name].step, args.warm_up, models[name].device)
    working = {name: model for name, model in models.items() if model.seconds is not None}
    for _ in range(args.epochs):
        for name, model in working.items():
            with reported(f"{case}, {name}", failures), settled(name):
                model.train_an_epoch()
    rows = []
    for name, model in working.items():
        if name == EINSUM or not model.seconds or not working[EINSUM].seconds:
            continue
        with reported(f"{case}, {name}, its parts", failures), settled(name):
            rows.append(model.row(working[EINSUM]))
            model.write_profile(args.out / "train-profile.txt")
    return rows, failures


class Model:
    """CapsNet as published, with one implementation of its routing, and its seconds per epoch.

    Args:
        name: of an implementation, or EINSUM.
        case: the setting.
        dataset: on the device.
        width: channels of the convolutions.
    """

    def __init__(self, name: str, case: Case, dataset: Dataset, width: int) -> None:
        torch.manual_seed(0)
        self.name, self.case, self.device = name, case, dataset.train_images.device
        options = {"precision": case.precision, "batch_size": case.batch, "width": width}
        self.system = CapsNet(recipe="published", dataset="mnist", **options).to(self.device)
        self.layer = self.system.model.encoder.classes
        if name == EINSUM:
            self.system.model.encoder.classes = EinsumCapsules(self.layer)
        if case.compiled:
            self.system.compile_networks()
        self.step = SystemStep(self.system, dataset)
        self.seconds: list[float] | None = None

    def compare(self, einsum: "Model") -> None:
        """Raises AssertionError unless the class capsules of a few images are those of the einsum model."""
        images = self.step.dataset.test_images[:32].float() / 255
        found = self.capsules(images)
        with capsops.use_impl("reference"):
            wanted = einsum.capsules(images)
        error = relative_error(found, wanted.double())
        if not error < BOUNDS[self.case.precision]:
            raise AssertionError(f"{self.name} differs from {EINSUM} by {error:.1e} of the class capsules")
        self.seconds = []

    def capsules(self, images: Tensor) -> Tensor:
        """Class capsules, before any training."""
        torch.manual_seed(0)
        fresh = CapsNet(self.system.settings).to(self.device)
        if self.name == EINSUM:
            fresh.model.encoder.classes = EinsumCapsules(fresh.model.encoder.classes)
        with torch.no_grad(), self.step.training.autocast():
            return fresh.model.encoder(images).classes

    def train_an_epoch(self) -> None:
        """Times as many steps as an epoch has, and sees to it that the model has learned."""
        named: dict[str, Tensor] = {}

        def step() -> None:
            named.update(self.step())

        self.seconds.append(clock(step, self.step.batches.per_epoch, self.device))
        self.step.training.check()
        if len(self.step.dataset.train_labels) >= 60_000 and not named["batch_accuracy"] > 0.9:
            raise AssertionError(f"after an epoch {named['batch_accuracy']:.3f} of a batch are right")

    def row(self, einsum: "Model") -> Row:
        """What was found; the share of the routing is that of the layer by itself in the whole step."""
        routing, by_einsum = self.routing_alone()
        steps = self.step.batches.per_epoch
        row = Row(SUITE, "CapsNet", str(self.case), "training", self.case.precision, self.name)
        row.seconds, row.peers = min(self.seconds), {EINSUM: min(einsum.seconds)}
        row.spread = (max(self.seconds) - min(self.seconds)) / 2 / statistics.median(self.seconds)
        row.details = {
            "step": row.seconds / steps,
            "routing alone": routing,
            "einsum step": row.peers[EINSUM] / steps,
            "einsum's routing alone": by_einsum,
        }
        if not self.case.compiled:
            found = parts(self.step, PROFILED_STEPS, self.device)
            row.details |= {f"profiled {part}": seconds for part, seconds in found.items()}
        share = routing / row.details["step"]
        row.targets = [
            Target("seconds", EPOCH_SECONDS, row.seconds, most=True),
            Target("routing share", ROUTING_SHARE, share, most=True),
        ]
        return row

    def routing_alone(self) -> tuple[float, float]:
        """Seconds, forward and backward, of the routing layer by itself: ours, and by einsum."""
        seen: list[Tensor] = []
        images = self.step.dataset.train_images[: self.case.batch].float() / 255
        hook = self.layer.register_forward_hook(lambda _, inputs, v: seen.extend((*inputs, v)))
        with torch.no_grad(), self.step.training.autocast(), torch.compiler.set_stance("force_eager"):
            self.system.model.encoder(images)
        hook.remove()
        u, v = (x.to(torch.bfloat16 if self.case.precision == "bf16" else x.dtype) for x in seen)
        weights = [x.detach().to(u.dtype).requires_grad_() for x in (self.layer.weight, self.layer.bias)]
        inputs = (u.detach().requires_grad_(), *weights)
        forms = {"ours": capsops.capsule_routing, EINSUM: peers.einsum}
        calls = {
            name: partial(run, partial(form, iterations=self.layer.iterations), FORWARD_BACKWARD, inputs, v)
            for name, form in forms.items()
        }
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(4):
            for name, call in calls.items():
                samples[name].append(clock(call, ROUTING_CALLS, self.device) / ROUTING_CALLS)
        return statistics.median(samples["ours"][1:]), statistics.median(samples[EINSUM][1:])

    def write_profile(self, path: Path) -> None:
        """Adds the kernels that take longest, or on a CPU the ops, to a file."""
        found, wall = profiled(self.step, PROFILED_STEPS, self.device)
        longest = kernels(found) or sorted(
            ((event.key, event.self_cpu_time_total / 1e6) for event in found), key=lambda item: -item[1]
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            print(f"{self.name}, {self.case}: {wall * 1e3:.2f} ms a step under the profiler", file=file)
            for name, seconds in longest[:25]:
                print(f"{seconds / PROFILED_STEPS * 1e6:10.1f} µs a step  {name[:110]}", file=file)


@contextmanager
def reported(what: str, failures: list[str]) -> Iterator[None]:
    """An exception inside is printed and added to `failures`, for which the command fails at its end."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        failures.append(f"{what}: {type(error).__name__}: {error}")


def settled(name: str) -> capsops.use_impl:
    """The context in which a model runs."""
    return capsops.use_impl("auto" if name == EINSUM else name)


def available(device: str) -> list[str]:
    """The kernels that serve the device, or the reference where there is none."""
    found = [row.impl for row in dispatch.describe() if row.device == device and row.available]
    return [impl for impl in found if impl != "reference"] or ["reference"]


def product_ceiling(device: torch.device) -> dict[str, object]:
    """The best of a few large bf16 matrix products of random numbers."""
    n = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    call: Callable[[], Tensor] = partial(torch.mm, a, b)
    clock(call, 3, device)
    seconds = min(clock(call, 10, device) / 10 for _ in range(3))
    return {"flops": 2 * n**3 / seconds, "how": f"torch.mm of bf16, {n} × {n}"}


def plan(cases: list[Case], args: argparse.Namespace) -> str:
    """What a run does, in words."""
    impls = args.impl or ["every kernel of capsops that serves the device"]
    lines = [
        f"data: MNIST from INFOCAPSGAN_DATA={os.environ.get('INFOCAPSGAN_DATA', '(not set)')}",
        f"models: CapsNet as published, width {args.width}, on {args.device}",
        f"routed by: {', '.join([EINSUM, *impls])}",
    ]
    lines += [
        f"{case}: compare, {args.warm_up} steps, {args.epochs} epochs each in turns, "
        f"routing alone, {'' if case.compiled else 'profile'}".rstrip(", ")
        for case in cases
    ]
    lines.append(f"no further case is begun after {args.seconds:g} s; results go to {args.out}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.train", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--plan", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--impl", nargs="+", choices=dispatch.IMPLS[1:], help="[every kernel that serves the device]"
    )
    parser.add_argument("--precisions", nargs="+", choices=list(BOUNDS), default=["fp32", "bf16"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[128, 256])
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="one case with compiled networks",
    )
    parser.add_argument("--width", type=int, default=256, help="channels of the convolutions")
    parser.add_argument("--images", type=int, help="images of an epoch [all 60,000]")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="that are timed; the faster counts")
    parser.add_argument("--warm-up", type=int, default=WARM_UP_STEPS, help="steps before")
    parser.add_argument("--seconds", type=float, default=240, help="after which no case is begun")
    return parser


if __name__ == "__main__":
    main()
