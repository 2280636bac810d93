"""Every op of an implementation on a device against the reference in float64: shapes × options × dtypes.

python -m benchmarks.gpu.equivalence --impl triton [--device cuda] [--small]

Values and gradients, with outputs of torch.empty poisoned by torch's deterministic fill. With --small a few
shapes only. Prints a line for each failure; exits with 1 if there is one, or if nothing was compared.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from multiprocessing import get_context

import torch
from torch import Tensor

import capsops
from benchmarks.check import check
from benchmarks.gpu.floor import matrix_precision
from benchmarks.passes import FORWARD, FORWARD_BACKWARD, run
from capsops import reference

TF32_ROUNDING = 2**-10  # of a result's norm: operands rounded to 11 bits, through a few products
SMALL = [(1, 7, 3, 4, 8), (3, 33, 10, 16, 8), (17, 19, 11, 8, 4), (2, 5, 40, 32, 16)]  # B, I, J, D, K
FULL = [
    *SMALL,
    (1, 1152, 10, 16, 8),
    (2, 2048, 10, 16, 8),
    (5, 33, 2, 17, 5),
    (16, 1152, 10, 16, 8),
    (16, 100, 200, 16, 8),
    (32, 288, 12, 24, 8),
    (33, 50, 10, 16, 7),
    (64, 288, 10, 20, 8),
    (128, 144, 10, 17, 4),
    (37, 257, 10, 16, 16),
    (63, 300, 1, 16, 8),
    (64, 128, 10, 32, 32),
    (128, 1152, 10, 16, 8),
    (130, 65, 5, 8, 8),
    (4, 3872, 196, 16, 8),
    (64, 2, 10, 16, 8),
    (64, 10, 10, 52, 16),
    (64, 10, 3, 16, 62),
    (64, 2, 3, 100, 5),
    (512, 200, 10, 16, 8),
]
OPTIONS = [  # iterations, leaky, detach, bias
    (3, False, False, True),
    (3, False, False, False),
    (2, True, False, True),
    (3, True, True, False),
    (1, False, False, True),
    (1, True, False, False),
    (0, False, False, True),
    (4, False, True, True),
]
FEW_SHAPES = [
    (3, 33, 10, 16, 8),
    (17, 19, 11, 8, 4),
    (5, 33, 2, 17, 5),
    (128, 1152, 10, 16, 8),
    (16, 100, 200, 16, 8),
    (64, 128, 10, 32, 32),
    (70, 33, 3, 17, 5),
]
FEW_OPTIONS = [(3, False, False, True), (2, True, True, False)]
LARGEST = 1 << 27  # numbers of û that float64 on the device is asked for


@dataclass
class Outcome:
    """How many comparisons were made, the largest error of each dtype, what failed, what was not begun."""

    compared: int = 0
    worst: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    lost: bool = False  # nothing was compared: an earlier fault ended this process's use of the device

    def take(self, name: str, kind: str, compare: Callable[[], float]) -> None:
        """Runs one comparison; an exception of any kind is a failure of it."""
        self.compared += 1
        try:
            self.worst[kind] = max(self.worst.get(kind, 0.0), compare())
        except Exception as error:
            self.failures.append(f"{name}: {type(error).__name__}: {error}")


@dataclass(frozen=True)
class Comparison:
    """One op with its options, on inputs of one dtype."""

    name: str
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    passes: str
    terms: int  # products in the longest sum

    def __call__(self, tf32: bool) -> float:
        """The largest relative error; AssertionError where it is more than the dtype explains."""
        exact_inputs = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in self.inputs)
        with torch.no_grad():
            shape = self.plain(*self.inputs).shape
        grad = torch.randn(shape, device=self.inputs[0].device).to(self.inputs[0].dtype)
        exact = run(self.plain, self.passes, exact_inputs, grad.double())
        by_plain = run(self.plain, self.passes, self.inputs, grad)
        found = run(self.ours, self.passes, self.inputs, grad)
        again = run(self.ours, self.passes, self.inputs, grad)
        for x, y in zip(found, again, strict=True):
            if not torch.equal(x, y):
                raise AssertionError(f"{self.name}: two calls differ by {(x - y).abs().max().item():.2e}")
        terms = self.terms
        if tf32:  # as many float32 roundings as amount to TF32's
            terms = max(terms, int((2 * TF32_ROUNDING / torch.finfo(torch.float32).eps) ** 2))
        return check(self.name, found, by_plain, exact, terms)


def comparisons(
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[tuple],
    options: Sequence[tuple] = OPTIONS,
) -> Iterator[Comparison]:
    """Every op on every shape, capsule_routing and dynamic_routing with every set of options."""

    def numbers(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()

    for B, I, J, D, K in shapes:  # noqa: E741
        if B * I * J * D > LARGEST:
            continue
        label = f"{str(dtype).removeprefix('torch.')} B={B} I={I} J={J} D={D} K={K}"
        u, weight, bias = (
            numbers(B, I, K, scale=0.3),
            numbers(I, J, D, K, scale=0.1),
            numbers(J, D, scale=0.1),
        )
        terms = I * K * J * D + B
        for dim in (-1, 1):
            squash = partial(capsops.squash, dim=dim, impl=impl)
            plain = partial(reference.squash, dim=dim)
            yield Comparison(f"squash dim={dim} {label}", squash, plain, (u,), FORWARD_BACKWARD, I)
        predictions = partial(capsops.predictions, impl=impl)
        yield Comparison(
            f"predictions {label}", predictions, reference.predictions, (u, weight), FORWARD_BACKWARD, terms
        )
        u_hat = reference.predictions(u, weight).detach().requires_grad_()
        for iterations, leaky, detach, with_bias in options:
            chosen_options = {"iterations": iterations, "leaky": leaky}
            chosen = f"T={iterations} leaky={leaky} detach={detach} bias={with_bias} {label}"
            biases = (bias,) if with_bias else ()
            for op, inputs in (("capsule_routing", (u, weight)), ("dynamic_routing", (u_hat,))):
                ours = partial(getattr(capsops, op), **chosen_options, detach=detach, impl=impl)
                plain = partial(getattr(reference, op), **chosen_options, detach=detach)
                name = f"{op} {chosen}"
                yield Comparison(name, ours, plain, (*inputs, *biases), FORWARD_BACKWARD, terms)
            ours = partial(capsops.couplings, **chosen_options, impl=impl)
            plain = partial(reference.couplings, **chosen_options)
            yield Comparison(f"couplings {chosen}", ours, plain, (u, weight, *biases), FORWARD, terms)


def _modes(device: torch.device) -> list[tuple[torch.dtype, bool]]:
    """Dtypes, float32 with and without TF32."""
    modes = [(torch.float32, False), (torch.bfloat16, False), (torch.float16, False)]
    return [*modes, (torch.float32, True)] if device.type == "cuda" else modes


@dataclass(frozen=True)
class Task:
    """All comparisons of one shape in one dtype."""

    impl: str
    device: torch.device
    shape: tuple[int, ...]
    dtype: torch.dtype
    tf32: bool
    options: Sequence[tuple]
    end: float  # by time.time()

    def __str__(self) -> str:
        return f"{self.kind} {self.shape}"

    @property
    def kind(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{' with TF32' if self.tf32 else ''}"


def _device_works(device: torch.device) -> bool:
    try:
        torch.zeros(1, device=device).cpu()
    except RuntimeError:
        return False
    return True


def compare(task: Task) -> Outcome:
    """The comparisons of a task, until its end. Memory is poisoned meanwhile.

    A kernel that reads or writes where it may not ends the whole process's use of the device: the task stops
    there, and later ones in the same process are `lost`.
    """
    if not _device_works(task.device):
        return Outcome(lost=True)
    torch.manual_seed(0)
    outcome = Outcome()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns
    try:
        with matrix_precision(task.tf32):
            cases = comparisons(task.impl, task.device, task.dtype, [task.shape], task.options)
            for comparison in cases:
                if time.time() > task.end:
                    outcome.late.append(f"not compared, time was over: {task.kind}: {comparison.name} and on")
                    break
                failed = len(outcome.failures)
                outcome.take(f"{task.kind}: {comparison.name}", task.kind, partial(comparison, task.tf32))
                if len(outcome.failures) > failed and not _device_works(task.device):
                    outcome.late.append(
                        f"not compared, the device was lost: {task.kind}: what follows {comparison.name}"
                    )
                    break
    except Exception as error:  # where inputs could not be made
        outcome.failures.append(f"{task}: {type(error).__name__}: {error}")
    finally:
        torch.use_deterministic_algorithms(before)
    return outcome


def compare_all(
    impl: str,
    device: torch.device,
    shapes: Sequence[tuple],
    seconds: float,
    workers: int = 0,
    options: Sequence[tuple] = OPTIONS,
    each: Callable[[Task, Outcome], None] = lambda task, outcome: None,
) -> Outcome:
    """All comparisons in every dtype, float32 with and without TF32, as far as the seconds reach.

    With `workers` so many processes share the work: most of the time goes into compiling kernels. `each` is
    told the outcome of a task as soon as it is known.
    """
    end = time.time() + seconds
    tasks = [
        Task(impl, device, shape, *mode, options, end) for shape, mode in product(shapes, _modes(device))
    ]
    outcome = Outcome()

    def join(task: Task, one: Outcome) -> None:
        each(task, one)
        outcome.compared += one.compared
        outcome.failures += one.failures
        outcome.late += one.late
        for kind, error in one.worst.items():
            outcome.worst[kind] = max(outcome.worst.get(kind, 0.0), error)

    if not workers:
        for task in tasks:
            join(task, compare(task))
        return outcome
    while tasks:
        lost = []
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            running = {pool.submit(compare, task): task for task in tasks}
            for future in as_completed(running):
                task = running[future]
                try:
                    one = future.result()
                except Exception as error:  # of the process itself
                    one = Outcome(failures=[f"{task}: {type(error).__name__}: {error}"])
                if one.lost:
                    lost.append(task)
                else:
                    join(task, one)
        if len(lost) == len(tasks):
            outcome.failures.append(f"{len(lost)} tasks: the device does not work in a new process")
            break
        tasks = lost
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--impl", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a few small shapes")
    parser.add_argument("--seconds", type=float, default=240, help="where it ends at the latest")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: this one")
    args = parser.parse_args()
    shapes = SMALL if args.small else FULL
    outcome = compare_all(args.impl, torch.device(args.device), shapes, args.seconds, args.workers)
    print(*outcome.late, *outcome.failures, sep="\n")
    print(f"{outcome.compared} compared, {len(outcome.failures)} failed; largest errors {outcome.worst}")
    sys.exit(bool(outcome.failures) or not outcome.compared)


if __name__ == "__main__":
    main()
