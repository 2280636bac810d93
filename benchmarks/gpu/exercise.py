"""Every op of an implementation on small shapes, forward and backward, once each: for compute-sanitizer.

python -m benchmarks.gpu.exercise --impl cuda [--device cuda] [--share 0/8]

Inputs come from the host and nothing else runs on the device but what autograd needs, so that what a tool
finds is the op's. Exits with 1 where a result is not finite.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

import capsops
from benchmarks.gpu.equivalence import SMALL
from benchmarks.gpu.floor import matrix_precision
from benchmarks.passes import FORWARD, FORWARD_BACKWARD, run

OPTIONS = [  # iterations, leaky, detach, bias: what takes paths of its own
    (3, False, False, True),
    (2, True, True, False),
    (6, False, False, False),
    (0, False, False, True),
]


def calls(
    impl: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
) -> Iterator[tuple[str, Callable[..., Tensor], tuple[Tensor, ...], str]]:
    """Name, function, inputs and passes of each call."""
    B, I, J, D, K = shape  # noqa: E741

    def numbers(*sizes: int) -> Tensor:
        return (torch.randn(*sizes) / 3).to(dtype).to(device).requires_grad_()

    u, weight, u_hat, bias = numbers(B, I, K), numbers(I, J, D, K), numbers(B, I, J, D), numbers(J, D)
    for dim in (-1, 1):
        yield "squash", partial(capsops.squash, dim=dim, impl=impl), (u,), FORWARD_BACKWARD
    yield "predictions", partial(capsops.predictions, impl=impl), (u, weight), FORWARD_BACKWARD
    for iterations, leaky, detach, with_bias in OPTIONS:
        biases = (bias,) if with_bias else ()
        options = {"iterations": iterations, "leaky": leaky, "impl": impl}
        for name, inputs in (("capsule_routing", (u, weight)), ("dynamic_routing", (u_hat,))):
            op = partial(getattr(capsops, name), **options, detach=detach)
            yield name, op, (*inputs, *biases), FORWARD_BACKWARD
        yield "couplings", partial(capsops.couplings, **options), (u, weight, *biases), FORWARD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--impl", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--share", default="0/1", help="which shapes and dtypes, such as 1/4")
    args = parser.parse_args()
    share, shares = map(int, args.share.split("/"))
    device, made, wrong = torch.device(args.device), 0, []
    torch.manual_seed(0)
    modes = [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float16, False)]
    for shape, (dtype, tf32) in list(product(SMALL, modes))[share::shares]:
        with matrix_precision(tf32):
            for name, function, inputs, passes in calls(args.impl, device, dtype, shape):
                with torch.no_grad():
                    like = function(*inputs).cpu()
                grad = torch.randn(like.shape).to(dtype).to(device)
                made += 1
                if not all(x.cpu().isfinite().all() for x in run(function, passes, inputs, grad)):
                    wrong.append(f"{name} in {dtype} on {shape}: not finite")
        print(f"{dtype}{' with TF32' if tf32 else ''} on {shape} done", flush=True)
    print(*wrong, sep="\n")
    print(f"{made} calls, {len(wrong)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
