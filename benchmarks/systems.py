"""Seconds of a training step of each system, and what of them is routing, convolutions, loading.

python -m benchmarks.systems [SYSTEM ...] [--save-results]

Each system has its published settings on images of 28 × 28, unless --recipe or --width says otherwise.
CapsNet is timed in turns with the same model routed by einsum; of both, the routing layer is timed by itself
as well, on the tensors that it has in the step.
"""

import argparse
import os
import sys
from functools import partial

import torch
from torch import Tensor

import capsops
from benchmarks import machine
from benchmarks.report import describe, steps_list
from benchmarks.rows import RESULTS, Row, save
from benchmarks.system_step import EinsumCapsules, SystemStep, check_equal, parts, profiled
from capsops import dispatch
from capsops.backends.device import cpu_model
from capsops.measuring import peers
from capsops.measuring.passes import FORWARD_BACKWARD, run
from capsops.measuring.timing import CPU, Race
from infocapsgan.systems import SYSTEMS, CapsNet
from infocapsgan.systems.class_code import ClassCodeGAN
from infocapsgan.systems.system import System

PROFILED_STEPS = 3


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.systems or SYSTEMS:
        new = [step_row(name, args)] + ([einsum_row(args)] if name == "capsnet" else [])
        print(*steps_list(new), sep="\n", flush=True)
        rows += new
    header = machine.header(["python", "-m", "benchmarks.systems", *sys.argv[1:]])
    print("", describe(header), sep="\n")
    if args.save_results:
        path = RESULTS / f"systems-cpu-{machine.slug(cpu_model())}.json"
        save(path, header, rows)
        print(f"saved {path}")


def build(name: str, args: argparse.Namespace) -> System:
    """The system, always with the same weights."""
    torch.manual_seed(0)
    chosen = {"width": args.width, "batch_size": args.batch_size, "precision": args.precision}
    options = {option: value for option, value in chosen.items() if value is not None}
    # Steps of a warm-up, in which nothing is generated yet, are not the ones to time.
    options |= {"warm_up": 0} if issubclass(SYSTEMS[name], ClassCodeGAN) else {}
    return SYSTEMS[name](recipe=args.recipe, **options)


def timed(name: str, systems: dict[str, System]) -> tuple[Row, SystemStep]:
    """A row with the times of a system's step, "ours", and of its peers' in turns; and that step."""
    steps = {kind: SystemStep(system, system.load_data()) for kind, system in systems.items()}
    s = systems["ours"].settings
    case = f"{s.recipe}, B={s.batch_size}, width {s.width}"
    row = Row("systems", name, case, "training step", s.precision, dispatch.automatic("cpu"))
    race = Race(steps)
    race.run()
    row.take_times(race)
    return row, steps["ours"]


def step_row(name: str, args: argparse.Namespace) -> Row:
    """Times the step of one system, then has it profiled."""
    row, step = timed(name, {"ours": build(name, args)})
    row.details = parts(*profiled(step, PROFILED_STEPS, CPU), PROFILED_STEPS, CPU)
    return row


def einsum_row(args: argparse.Namespace) -> Row:
    """CapsNet beside the same model with the einsum routing."""
    ours, einsum = build("capsnet", args), build("capsnet", args)
    einsum.model.encoder.classes = EinsumCapsules(einsum.model.encoder.classes)
    check_equal(ours, einsum, ours.load_data())
    row, step = timed("capsnet", {"ours": ours, "einsum": einsum})
    row.details = routing_alone(ours, step)
    return row


def routing_alone(system: CapsNet, step: SystemStep) -> dict[str, float]:
    """Seconds, forward and backward, of the routing layer by itself: ours and the einsum form, in turns."""
    seen: list[Tensor] = []
    layer = system.model.encoder.classes
    hook = layer.register_forward_hook(lambda _, inputs, v: seen.extend((inputs[0].detach(), v.detach())))
    step()
    hook.remove()
    u, v = seen
    # Under autocast the layer works in 16 bits.
    inputs = tuple(x.detach().to(v.dtype).requires_grad_() for x in (u, layer.weight, layer.bias))
    forms = {"routing by itself": capsops.capsule_routing, "einsum's routing by itself": peers.einsum}
    calls = {
        name: partial(run, partial(form, iterations=layer.iterations), FORWARD_BACKWARD, inputs, v)
        for name, form in forms.items()
    }
    return Race(calls).run()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.systems", description=__doc__.splitlines()[0])
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", help=f"of {', '.join(SYSTEMS)} [all]")
    parser.add_argument("--recipe", choices=["published", "tuned"], default="published")
    parser.add_argument("--width", type=int, help="channels [those of the recipe]")
    parser.add_argument("--batch-size", type=int, help="[that of the recipe]")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of torch [2]")
    parser.add_argument("--save-results", action="store_true", help="write benchmarks/results/systems-*.json")
    args = parser.parse_args()
    if unknown := set(args.systems) - set(SYSTEMS):
        parser.error(f"SYSTEM: got {', '.join(sorted(unknown))}, takes {', '.join(SYSTEMS)}")
    return args


if __name__ == "__main__":
    main()
