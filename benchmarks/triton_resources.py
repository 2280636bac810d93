"""`python -m benchmarks.triton_resources`: what each Triton kernel takes on each GPU, read without one.

A row a kernel × dtype × shape class × target: programs of the launch, those that a multiprocessor has room
for (sm_90), warps of a program, registers and stack bytes of a thread, spills, shared bytes of a program,
instructions in all and of the matrix unit.
"""

import argparse
from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace

import torch

import capsops
from benchmarks.triton_compile import TARGETS, Compiled, Resources, compiling, resources, room
from capsops.measuring.cases import Case
from capsops.measuring.precisions import PRECISIONS

# Layers of the published systems, a small batch, one whose sizes divide nothing, and one of large vectors.
CLASSES = {
    "MNIST": Case(128),
    "small batch": Case(16),
    "large": Case(128, 3872, 196),
    "odd": Case(65, 3, 11, 17, 5),
    "large vectors": Case(64, 10, 3, 100, 200),
}


def launches(
    case: Case, precision: str, target: str, *, leaky: bool = False, detach: bool = False
) -> list[Compiled]:
    """Every kernel that the ops launch for the case, forward and backward, each variant once."""
    dtype, tf32 = PRECISIONS[precision]
    B, I, J, D, K = case.sizes  # noqa: E741
    u, weight, bias, u_hat = (
        torch.empty(n, dtype=dtype, device="meta") for n in ((B, I, K), (I, J, D, K), (J, D), (B, I, J, D))
    )
    kernels = SimpleNamespace(**capsops.dispatch.BACKENDS["triton"].functions)
    with compiling(target, tf32) as launched:
        kernels.squash_backward(u, kernels.squash(u, 2), 2)
        kernels.predictions_backward(kernels.predictions(u, weight), u, weight, True, True)
        for iterations in (0, 3):
            v, s = kernels.dynamic_routing(u_hat, bias, None, None, iterations, leaky, True)
            kernels.dynamic_routing_backward(v, u_hat, None, None, s, iterations, leaky, detach, True, False)
            v, s = kernels.capsule_routing(u, weight, bias, None, None, iterations, leaky, True)
            kernels.capsule_routing_backward(
                v, u, weight, None, None, s, iterations, leaky, detach, True, True, True, False
            )
        kernels.couplings(u, weight, bias, None, None, 3, leaky)
    return list({id(launch.artifact): launch for launch in launched}.values())


def option_launches(case: Case, precision: str, target: str) -> list[Compiled]:
    """Every kernel that the routing ops launch with their options, each variant once.

    That is with starting logits and a mask: logits of every sample, which may close pairs, and logits that
    all samples share, each with its gradient; and a weight that all input capsules share.
    """
    dtype, tf32 = PRECISIONS[precision]
    B, I, J, D, K = case.sizes  # noqa: E741
    u, weight, shared, u_hat, alike, grad = (
        torch.empty(n, dtype=dtype, device="meta")
        for n in ((B, I, K), (I, J, D, K), (J, D, K), (B, I, J, D), (B, I, D), (B, J, D))
    )
    mask = torch.empty(B, I, dtype=torch.bool, device="meta")
    kernels = SimpleNamespace(**capsops.dispatch.BACKENDS["triton"].functions)
    with compiling(target, tf32) as launched:
        for sizes, iterations in (((B, I, J), 3), ((1, I, J), 3), ((B, I, J), 0), (None, 3), (None, 1)):
            logits = None if sizes is None else torch.empty(sizes, dtype=dtype, device="meta")
            for w in (weight, shared):
                _, s = kernels.capsule_routing(u, w, None, logits, mask, iterations, False, False)
                kernels.capsule_routing_backward(
                    grad, u, w, logits, mask, s, iterations, False, False, False, True, True,
                    logits is not None,
                )  # fmt: skip
                kernels.couplings(u, w, None, logits, mask, iterations, False)
            for x in (u_hat,) if logits is None else (u_hat, alike):
                _, s = kernels.dynamic_routing(x, None, logits, mask, iterations, False, False)
                kernels.dynamic_routing_backward(
                    grad, x, logits, mask, s, iterations, False, False, False, logits is not None
                )
    return list({id(launch.artifact): launch for launch in launched}.values())


def rows(
    shapes: list[str], precisions: list[str], targets: list[str]
) -> Iterator[tuple[str, str, str, Compiled, Resources]]:
    """Each kernel as compiled, and what it takes; one that works in float32 whatever the dtype comes once."""
    for shape, target in product(shapes, targets):
        seen = {}
        for precision in precisions:
            for launch in launches(CLASSES[shape], precision, target):
                if seen.setdefault(launch.artifact.hash, launch) is launch:
                    yield shape, precision, target, launch, resources(launch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=CLASSES, default=list(CLASSES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    chosen = parser.parse_args()
    heads = (
        "shape,precision,target,kernel,programs,room,warps,registers,stack,spills,shared,instructions,matrix"
    )
    print(heads.replace(",", "\t"))
    for shape, precision, target, launch, needs in rows(chosen.shapes, chosen.precisions, chosen.targets):
        warps = launch.options["num_warps"]
        fit = room(needs, warps) if target == "sm_90" else ""
        cells = [shape, precision, target, launch.title, launch.programs, fit, warps]
        cells += [needs.registers, needs.stack, needs.spills, needs.shared]
        print(*cells, needs.instructions.total(), needs.tensor_core, sep="\t", flush=True)


if __name__ == "__main__":
    main()
