"""`python -m benchmarks.triton_resources`: what each Triton kernel takes on each GPU, read without one.

A row a kernel × dtype × shape class × target: programs of the launch, warps of a program, registers and stack
bytes of a thread, spills, shared bytes of a program, instructions in all and of the matrix unit.
"""

import argparse
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import torch

import capsops
from benchmarks.cases import RoutingCase
from benchmarks.triton_compile import TARGETS, Compiled, Resources, compiling, resources

PRECISIONS = {
    "float32": (torch.float32, False),
    "float32, TF32 allowed": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}

# Layers of the published systems, a small batch, one whose sizes divide nothing, and one of large vectors.
CLASSES = {
    "MNIST": RoutingCase(128),
    "small batch": RoutingCase(16),
    "large": RoutingCase(128, 3872, 196),
    "odd": RoutingCase(65, 3, 11, 17, 5),
    "large vectors": RoutingCase(64, 10, 3, 100, 200),
}


class Row(NamedTuple):
    """One kernel as compiled, and what it takes."""

    shape: str
    precision: str
    target: str
    compiled: Compiled
    resources: Resources


def launches(
    case: RoutingCase, precision: str, target: str, *, leaky: bool = False, detach: bool = False
) -> list[Compiled]:
    """Every kernel that the ops launch for the case, forward and backward, each variant once."""
    dtype, tf32 = PRECISIONS[precision]
    B, I, J, D, K = case.batch, case.in_capsules, case.out_capsules, case.out_dim, case.in_dim  # noqa: E741
    u, weight, bias, u_hat = (
        torch.empty(n, dtype=dtype, device="meta") for n in ((B, I, K), (I, J, D, K), (J, D), (B, I, J, D))
    )
    kernels = SimpleNamespace(**capsops.dispatch.BACKENDS["triton"].functions)
    with compiling(target, tf32) as found:
        kernels.squash_backward(u, kernels.squash(u, 2), 2)
        kernels.predictions_backward(kernels.predictions(u, weight), u, weight, True, True)
        for iterations in (0, 3):
            v, s = kernels.dynamic_routing(u_hat, bias, iterations, leaky, True)
            kernels.dynamic_routing_backward(v, u_hat, s, iterations, leaky, detach, True)
            v, s = kernels.capsule_routing(u, weight, bias, iterations, leaky, True)
            kernels.capsule_routing_backward(v, u, weight, s, iterations, leaky, detach, True, True, True)
        kernels.couplings(u, weight, bias, 3, leaky)
    return list({id(launch.artifact): launch for launch in found}.values())


def rows(shapes: list[str], precisions: list[str], targets: list[str]) -> Iterator[Row]:
    for shape in shapes:
        for target in targets:
            seen = set()
            for precision in precisions:
                for launch in launches(CLASSES[shape], precision, target):
                    if launch.artifact.hash in seen:  # a kernel that works in float32 whatever the dtype
                        continue
                    seen.add(launch.artifact.hash)
                    yield Row(shape, precision, target, launch, resources(launch))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=CLASSES, default=list(CLASSES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    chosen = parser.parse_args()
    heads = "shape,precision,target,kernel,programs,warps,registers,stack,spills,shared,instructions,matrix"
    print(heads.replace(",", "\t"))
    for row in rows(chosen.shapes, chosen.precisions, chosen.targets):
        launch, found = row.compiled, row.resources
        cells = [row.shape, row.precision, row.target, launch.title, launch.programs]
        cells += [launch.options["num_warps"], found.registers, found.stack, found.spills, found.shared]
        cells += [found.instructions.total(), found.tensor_core]
        print("\t".join(map(str, cells)), flush=True)


if __name__ == "__main__":
    main()
