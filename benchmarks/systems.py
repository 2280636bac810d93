"""Seconds of a training step of each system, and what of them is routing, convolutions, loading.

python -m benchmarks.systems [SYSTEM ...] [--save-results]

Each system has its published settings on images of 28 × 28, unless --recipe or --width says otherwise.
CapsNet takes turns with the same model routed by einsum; of both, the routing layer is timed by itself as
well, on the tensors that it has in the step.
"""

import argparse
import os
import statistics
import sys
from functools import partial

import torch
from torch import Tensor

import capsops
from benchmarks import machine, peers
from benchmarks.ceiling import measured_ceiling
from benchmarks.check import relative_error
from benchmarks.passes import FORWARD_BACKWARD, run
from benchmarks.report import describe, parts_table, systems_tables
from benchmarks.rows import RESULTS, Row, save
from benchmarks.system_step import EinsumCapsules, SystemStep, clock, parts
from benchmarks.timing import Race
from capsops import dispatch
from infocapsgan.data import Dataset
from infocapsgan.systems import SYSTEMS, CapsNet
from infocapsgan.systems.class_code import ClassCodeGAN
from infocapsgan.systems.system import System

SUITE = "systems"


def main() -> None:
    args = _checked(_parser())
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    rows = []
    for name in args.systems or SYSTEMS:
        rows.append(step_row(name, args))
        print(*parts_table(rows[-1:])[2:], sep="\n", flush=True)
        if name == "capsnet":
            rows.append(einsum_row(args))
    header = {
        **machine.provenance(["python", "-m", "benchmarks.systems", *sys.argv[1:]]),
        "device": {**machine.cpu(), "load_before": load},
        "ceiling": measured_ceiling(args.threads)._asdict(),
    }
    print("", *systems_tables(rows), "", describe(header), sep="\n")
    if args.save_results:
        path = RESULTS / f"systems-cpu-{machine.slug(machine.cpu_model())}.json"
        save(path, header, rows)
        print(f"saved {path}")


def build(name: str, args: argparse.Namespace) -> System:
    """The system, always with the same weights."""
    torch.manual_seed(0)
    given = {"width": args.width, "batch_size": args.batch_size, "precision": args.precision}
    options = {option: value for option, value in given.items() if value is not None}
    # Steps of a warm-up, in which there is nothing to generate yet, are not the ones to time.
    options |= {"warm_up": 0} if issubclass(SYSTEMS[name], ClassCodeGAN) else {}
    return SYSTEMS[name](recipe=args.recipe, **options)


def step_row(name: str, args: argparse.Namespace) -> Row:
    """Times the step of one system, then has it profiled."""
    system = build(name, args)
    step = SystemStep(system, system.load_data())
    clock(step, args.warm_up, step.device)
    samples = [clock(step, 1, step.device) for _ in range(args.steps)]
    row = _row(name, system)
    row.seconds, row.spread = statistics.median(samples), _spread(samples)
    row.details = parts(step, max(2, args.steps // 2), step.device)
    return row


def einsum_row(args: argparse.Namespace) -> Row:
    """CapsNet beside the same model with the einsum routing, in turns."""
    systems = {"ours": build("capsnet", args), "einsum": build("capsnet", args)}
    encoder = systems["einsum"].model.encoder
    encoder.classes = EinsumCapsules(encoder.classes)
    steps = {kind: SystemStep(system, system.load_data()) for kind, system in systems.items()}
    check_equal(*systems.values(), steps["ours"].dataset)
    samples = {kind: [] for kind in steps}
    for _ in range(args.warm_up + args.steps):
        for kind, step in steps.items():
            samples[kind].append(clock(step, 1, step.device))
    ours, einsum = (samples[kind][args.warm_up :] for kind in ("ours", "einsum"))
    row = _row("capsnet", systems["ours"])
    row.seconds, row.spread = statistics.median(ours), _spread(ours)
    row.peers = {"einsum": statistics.median(einsum)}
    row.details = alone(systems["ours"], steps["ours"])
    return row


def check_equal(ours: CapsNet, einsum: CapsNet, dataset: Dataset) -> None:
    """Raises AssertionError unless both models say the same of a few images."""
    batch = dataset.train_images[:8].float() / 255
    found, wanted = (system.model.encoder(batch).classes for system in (ours, einsum))
    error = relative_error(found, wanted.double())
    if not error < 1e-4:
        raise AssertionError(f"the two models differ by {error:.2e} of the class capsules")


def alone(system: CapsNet, step: SystemStep) -> dict[str, float]:
    """Seconds, forward and backward, of the routing layer by itself: ours and the einsum form, in turns."""
    seen: list[Tensor] = []
    layer = system.model.encoder.classes
    hook = layer.register_forward_hook(lambda _, inputs, v: seen.extend((inputs[0].detach(), v.detach())))
    step()
    hook.remove()
    u, v = seen
    # Under autocast the layer works in 16 bits.
    inputs = tuple(x.detach().to(v.dtype).requires_grad_() for x in (u, layer.weight, layer.bias))
    ours = partial(capsops.capsule_routing, iterations=layer.iterations)
    einsum = partial(peers.einsum, iterations=layer.iterations)
    race = Race(
        {
            "routing alone": partial(run, ours, FORWARD_BACKWARD, inputs, v),
            "einsum's routing alone": partial(run, einsum, FORWARD_BACKWARD, inputs, v),
        }
    )
    race.warm_up()
    for _ in range(race.rounds()):
        race.lap(race.candidates)
    return race.medians()


def _row(name: str, system: System) -> Row:
    s = system.settings
    case = f"{s.recipe}, B={s.batch_size}, width {s.width}"
    return Row(
        SUITE,
        name,
        case,
        "training step",
        s.precision,
        dispatch.automatic("cpu"),
    )


def _spread(samples: list[float]) -> float:
    low, middle, high = statistics.quantiles(samples, n=4)
    return (high - low) / 2 / middle


def _checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    if unknown := set(args.systems) - set(SYSTEMS):
        parser.error(f"SYSTEM: got {', '.join(sorted(unknown))}, takes {', '.join(SYSTEMS)}")
    if args.steps < 2:
        parser.error(f"--steps: got {args.steps}, takes at least 2")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.systems", description=__doc__.splitlines()[0])
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", help=f"of {', '.join(SYSTEMS)} [all]")
    parser.add_argument("--recipe", choices=["published", "tuned"], default="published")
    parser.add_argument("--width", type=int, help="channels [those of the recipe]")
    parser.add_argument("--batch-size", type=int, help="[that of the recipe]")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of torch [2]")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the first that counts [2]")
    parser.add_argument("--steps", type=int, default=7, help="that are timed; the median counts [7]")
    parser.add_argument("--save-results", action="store_true", help="write benchmarks/results/systems-*.json")
    return parser


if __name__ == "__main__":
    main()
