"""Every CUDA kernel on random shapes, options, devices and addresses, on the emulated device."""

import random
from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from capsops import reference
from tests.capsops.cases import LAYOUTS, Options, Shape, layer_inputs, routing_inputs, value_and_gradients
from tests.capsops.compare import assert_all_low_precision, root_mean_square
from tests.cuda_emulator.emulated import Emulated
from tests.cuda_emulator.test_kernels import (
    Run,
    capsule_routing,
    dynamic_routing,
    to_tf32,
    upstream,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = {**DTYPES, "tf32": torch.float32}

# An op, how it multiplies, and how many tiles of 8 its D fills; five are for the general kernels.
# "smem_cached" is dynamic_routing of the shapes that smem_cached.cu supports.
COMBINATIONS = [
    *product(["capsule_routing", "couplings"], PRECISIONS, range(1, 6)),
    *product(["dynamic_routing"], DTYPES, range(1, 6)),
    *product(["smem_cached"], DTYPES, [1, 2, 4]),
    *product(["predictions", "squash"], DTYPES, [None]),
]


WORK = 20_000  # most B I J D of a case, with whole tiles of D, which takes less than a second
FAST = len(COMBINATIONS)
SLOW = 8 * len(COMBINATIONS)  # with four times the work


class Case(NamedTuple):
    number: int
    op: str
    precision: str
    shape: Shape
    options: Options
    device: dict[str, int | bool]
    offset: str  # which of u (or s or û), weight, bias and the gradient's inputs are not aligned: "uwbg"

    def __str__(self) -> str:
        device = "-".join(f"{name}={value}" for name, value in self.device.items())
        head = f"{self.number}-{self.op}-{self.precision}-{self.shape}-{self.options}-{device}"
        return f"{head}-offset={self.offset}" if self.offset else head


def log_uniform(rng: random.Random, least: int, most: int) -> int:
    """A random integer whose logarithm is uniform."""
    return min(most, int(least * ((most + 1) / least) ** rng.random()))


def case(number: int) -> Case:
    """Case `number` of a fixed sequence. Four cycles have small and large B and J for every combination."""
    cycle, at = divmod(number, len(COMBINATIONS))
    op, precision, tiles = COMBINATIONS[at]
    rng = random.Random(number)
    B = log_uniform(rng, 16, 70) if (at + cycle) % 2 == 0 else rng.randint(1, 15)
    if B >= 16 and rng.random() < 0.5:
        B -= B % 16  # without padding
    # More than 12 output capsules do not fit in one block, more than 10 are not cached in shared memory.
    J = log_uniform(rng, 13, 40) if (at // 2 + cycle // 2) % 2 == 0 else rng.randint(1, 12)
    most = 40 if tiles is None else 8 * tiles
    D = most if rng.random() < 0.4 else rng.randint(1 if tiles is None else most - 7, most)
    K = rng.choice([4, 8, 16, 24]) if rng.random() < 0.5 else rng.randint(1, 24)
    work = WORK if number < FAST else 4 * WORK
    if tiles == 5:  # the general kernels recompute the logits for every component of a gradient
        work //= 4
    if op == "smem_cached":  # small B and J, so that warps have several sets of input capsules
        B, J = B if B >= 16 else min(B, 3), min(J, 10) if B >= 16 else min(J, 4)
    most_i = max(2, min(400 if op == "smem_cached" else 300, work // (B * J * most)))
    I = rng.randint(most_i // 2 if op == "smem_cached" else 1, most_i)  # noqa: E741
    options = Options(rng.choice([0, 1, 2, 2, 3, 3, 4, 5]), *(rng.random() < 0.5 for _ in range(3)))
    device = {
        "multiprocessors": rng.randint(1, 16),
        "shared_per_block": 1024 * rng.choice([16, 64, 99, 163, 227, 227]),
        "cooperative": rng.random() < 0.7,
    }
    if op == "smem_cached":
        options = options._replace(iterations=max(options.iterations, 2))
        busy = [m for m in range(1, 17) if 2 * m * -(-B // m) <= 3 * B]
        device |= {"multiprocessors": rng.choice(busy), "shared_per_block": 1024 * 227}
    offset = "".join(name for name in "uwbg" if rng.random() < 0.5) if rng.random() < 0.5 else ""
    return Case(number, op, precision, Shape(B, I, J, D, K), options, device, offset)


CASES = [
    pytest.param(case(n), id=str(case(n)), marks=pytest.mark.slow if n >= FAST else ())
    for n in range(FAST + SLOW)
]


def random_inputs(case: Case) -> list[Tensor | None]:
    dtype, shape, bias = PRECISIONS[case.precision], case.shape, case.options.bias
    if case.op == "squash":
        return [torch.randn(shape.B, shape.J, shape.D, dtype=torch.float64).to(dtype)]
    if case.op in ("dynamic_routing", "smem_cached"):
        return list(routing_inputs(shape, bias, dtype))
    return list(layer_inputs(shape, bias, dtype))[: 2 if case.op == "predictions" else 3]


def run_kernels(emulated: Emulated, case: Case, inputs: Sequence[Tensor | None]) -> Run:
    def backward(x: Tensor) -> Tensor:
        return LAYOUTS["offset"](x) if "g" in case.offset else x

    names = "ub" if case.op in ("dynamic_routing", "smem_cached") else "uwb"
    placed = [
        LAYOUTS["offset"](x) if x is not None and name in case.offset else x
        for x, name in zip(inputs, names, strict=False)
    ]
    options, device = case.options, case.device
    if case.op == "capsule_routing":
        return capsule_routing(emulated, placed, options, backward, **device)
    if case.op in ("dynamic_routing", "smem_cached"):
        return dynamic_routing(emulated, placed, options, backward, **device)
    if case.op == "couplings":
        (c,) = emulated.call("couplings", *placed, None, None, options.iterations, options.leaky, **device)
        return {"value": c}
    if case.op == "predictions":
        (value,) = emulated.call("predictions", *placed, **device)
        grads = emulated.call(
            "predictions_backward", backward(upstream(value)), *placed, True, True, **device
        )
    else:
        (value,) = emulated.call("squash", *placed, dim_of_squash(case), **device)
        grads = emulated.call(
            "squash_backward", backward(upstream(value)), *placed, dim_of_squash(case), **device
        )
    return {"value": value, **{f"gradient {n}": grad for n, grad in enumerate(grads)}}


def dim_of_squash(case: Case) -> int:
    return case.number % 3


def plain_torch(case: Case) -> tuple[Callable[..., Tensor], list[str]]:
    """The formula, and the axes of its inputs and, last, of its value."""
    options = case.options
    if case.op == "squash":
        return lambda s: reference.squash(s, dim_of_squash(case)), ["bjd", "bjd"]
    if case.op == "predictions":
        return reference.predictions, ["bik", "ijdk", "bijd"]
    if case.op in ("dynamic_routing", "smem_cached"):
        return lambda *x: reference.dynamic_routing(*x, **options.keywords()), ["bijd", "jd", "bjd"]

    def formula(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if case.precision == "tf32" and u.dtype == torch.float32:
            u, weight = to_tf32(u), to_tf32(weight)
        if case.op == "capsule_routing":
            return reference.capsule_routing(u, weight, bias, **options.keywords())
        return reference.couplings(u, weight, bias, iterations=options.iterations, leaky=options.leaky)

    return formula, ["bik", "ijdk", "jd", "bij" if case.op == "couplings" else "bjd"]


def in_float64(case: Case, inputs: Sequence[Tensor | None]) -> Run:
    """Value and gradients in float64 for the same numbers, including the upstream gradient."""
    dtype, differentiable = PRECISIONS[case.precision], case.op != "couplings"
    return value_and_gradients(
        plain_torch(case)[0],
        [None if x is None else x.double() for x in inputs],
        lambda value: upstream(value.to(dtype)).double(),
        [differentiable and x is not None for x in inputs],
    )


def permuted(x: Tensor | None, axes: str, order: dict[str, Tensor]) -> Tensor | None:
    for dim, axis in enumerate(axes if x is not None else ""):
        x = x.index_select(dim, order[axis])
    return x


def in_random_order(case: Case, inputs: Sequence[Tensor | None]) -> Run:
    """Value and gradients of plain torch, computed with every axis in a random order."""
    formula, (*axes, of_value) = plain_torch(case)
    order = {
        axis: torch.randperm(size)
        for x, names in zip(inputs, axes, strict=True)
        if x is not None
        for axis, size in zip(names, x.shape, strict=True)
    }
    run = value_and_gradients(
        formula,
        [permuted(x, names, order) for x, names in zip(inputs, axes, strict=True)],
        lambda value: permuted(upstream(value), of_value, order),
        [case.op != "couplings" and x is not None for x in inputs],
    )
    back = {axis: one.argsort() for axis, one in order.items()}
    of = {"value": of_value, **{f"gradient {n}": names for n, names in enumerate(axes)}}
    return {name: permuted(x, of[name], back) for name, x in run.items()}


def plain_runs(case: Case, inputs: Sequence[Tensor | None], exact: Run, count: int) -> list[Run]:
    """Runs of plain torch to compare with: `count` on these inputs and as many on others of the same shape.

    The largest error varies by chance, and if it comes from an exponential or a division no order of the sums
    changes it. So the relative errors on other inputs count too; they are added to `exact`.
    """
    runs = [in_random_order(case, inputs) for _ in range(count)]
    for _ in range(count):
        others = random_inputs(case)
        exact_others, run = in_float64(case, others), {}
        for name, x in in_random_order(case, others).items():
            size = root_mean_square(exact[name]) / (root_mean_square(exact_others[name]) or 1)
            run[name] = exact[name] + size * (x.double() - exact_others[name])
        runs.append(run)
    return runs


@pytest.mark.parametrize("case", CASES)
def test_random_shape(emulated: Emulated, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated.implementation, "_allows_tf32", lambda: case.precision == "tf32")
    if case.op == "smem_cached":
        B, I, J, D, _ = case.shape  # noqa: E741
        element, logits = PRECISIONS[case.precision].itemsize, case.options.iterations - 1
        limits = (case.device["multiprocessors"], case.device["shared_per_block"])
        assert emulated.extension.smem_cached_plan(B, I, J, D, element, logits, *limits) is not None
    inputs = random_inputs(case)
    got, exact = run_kernels(emulated, case, inputs), in_float64(case, inputs)
    lows = plain_runs(case, inputs, exact, 2)
    try:
        assert_all_low_precision(got, lows, exact)
    except AssertionError:  # either an error or chance, which more runs distinguish
        assert_all_low_precision(got, lows + plain_runs(case, inputs, exact, 20), exact)
