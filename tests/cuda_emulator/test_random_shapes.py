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
from tests.capsops.compare import assert_all_low_precision
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

# How an op multiplies, and how many tiles of 8 its D fills; five are for the general kernels.
COMBINATIONS = [
    *product(["capsule_routing", "couplings"], PRECISIONS, range(1, 6)),
    *product(["dynamic_routing"], DTYPES, range(1, 6)),
    *product(["predictions", "squash"], DTYPES, [None]),
]


WORK = 40_000  # B I J D at most, D filling its tiles: keeps a case within a second or two
FAST = 2 * len(COMBINATIONS)
SLOW = 7 * len(COMBINATIONS)  # with twice the work


class Case(NamedTuple):
    number: int
    op: str
    precision: str
    shape: Shape
    options: Options
    device: dict[str, int | bool]
    offset: str  # of u (or s or û), weight, bias and what backward takes: those that are not aligned

    def __str__(self) -> str:
        device = "-".join(f"{name}={value}" for name, value in self.device.items())
        head = f"{self.number}-{self.op}-{self.precision}-{self.shape}-{self.options}-{device}"
        return f"{head}-offset={self.offset}" if self.offset else head


def spread(draw: random.Random, least: int, most: int) -> int:
    """As many small numbers as large ones: the logarithm is uniform."""
    return min(most, int(least * ((most + 1) / least) ** draw.random()))


def case(number: int) -> Case:
    """The same whenever it is asked for; four rounds cover all combinations, of small and large B and J."""
    cycle, at = divmod(number, len(COMBINATIONS))
    op, precision, tiles = COMBINATIONS[at]
    draw = random.Random(number)
    B = spread(draw, 16, 70) if (at + cycle) % 2 == 0 else draw.randint(1, 15)
    # More than 12 output capsules do not fit in one block, more than 10 are not resident.
    J = spread(draw, 13, 40) if (at // 2 + cycle // 2) % 2 == 0 else draw.randint(1, 12)
    most = 40 if tiles is None else 8 * tiles
    D = most if draw.random() < 0.3 else draw.randint(1 if tiles is None else most - 7, most)
    K = draw.choice([4, 8, 16, 24]) if draw.random() < 0.5 else draw.randint(1, 24)
    work = WORK if number < FAST else 2 * WORK
    if tiles == 5:  # the general kernels compute the logits anew for every component of a gradient
        work //= 4
    I = draw.randint(1, max(2, min(300, work // (B * J * most))))  # noqa: E741
    options = Options(draw.randint(0, 5), *(draw.random() < 0.5 for _ in range(3)))
    device = {
        "multiprocessors": draw.randint(1, 16),
        "shared_per_block": 1024 * draw.choice([16, 64, 99, 163, 227, 227]),
        "cooperative": draw.random() < 0.7,
    }
    offset = "".join(name for name in "uwbg" if draw.random() < 0.5) if draw.random() < 0.5 else ""
    return Case(number, op, precision, Shape(B, I, J, D, K), options, device, offset)


CASES = [
    pytest.param(case(n), id=str(case(n)), marks=pytest.mark.slow if n >= FAST else ())
    for n in range(FAST + SLOW)
]


def arranged(x: Tensor | None, axes: str, order: dict[str, Tensor]) -> Tensor | None:
    for dim, axis in enumerate(axes if x is not None else ""):
        x = x.index_select(dim, order[axis])
    return x


def runs_in_orders_of_all_axes(
    formula: Callable[..., Tensor], inputs: Sequence[Tensor | None], axes: Sequence[str], needs: bool
) -> list[Run]:
    """Plain torch's value and gradients with every axis in some other order, put back into the given one.

    `axes` are those of the inputs and, last, of the value. A small tensor's error in one run is a matter of
    luck; over several orders of all sums it is less so.
    """
    *of_inputs, of_value = axes
    sizes = {
        axis: size
        for x, names in zip(inputs, of_inputs, strict=True)
        if x is not None
        for axis, size in zip(names, x.shape, strict=True)
    }
    runs = []
    for _ in range(4):
        order = {axis: torch.randperm(size) for axis, size in sizes.items()}
        back = {axis: one.argsort() for axis, one in order.items()}
        run = value_and_gradients(
            formula,
            [arranged(x, names, order) for x, names in zip(inputs, of_inputs, strict=True)],
            lambda value, order=order: arranged(upstream(value), of_value, order),
            [needs and x is not None for x in inputs],
        )
        of = {"value": of_value, **{f"gradient {n}": names for n, names in enumerate(of_inputs)}}
        runs.append({name: arranged(x, of[name], back) for name, x in run.items()})
    return runs


@pytest.mark.parametrize("case", CASES)
def test_random_shape(emulated: Emulated, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, shape, options, device = PRECISIONS[case.precision], case.shape, case.options, case.device
    monkeypatch.setattr(emulated.implementation, "_allows_tf32", lambda: case.precision == "tf32")

    def place(x: Tensor | None, name: str) -> Tensor | None:
        return LAYOUTS["offset"](x) if x is not None and name in case.offset else x

    def backward(x: Tensor) -> Tensor:
        return place(x, "g")

    u, weight, bias = map(place, layer_inputs(shape, options.bias, dtype), "uwb")
    routing = {"iterations": options.iterations, "leaky": options.leaky}
    if case.op == "squash":
        dim = case.number % 3
        s = place(torch.randn(shape.B, shape.J, shape.D, dtype=torch.float64).to(dtype), "u")
        inputs, axes = [s], ["bjd", "bjd"]
        (v,) = emulated.call("squash", s, dim, **device)
        (grad,) = emulated.call("squash_backward", backward(upstream(v)), s, dim, **device)
        got = {"value": v, "gradient 0": grad}

        def formula(s: Tensor) -> Tensor:
            return reference.squash(s, dim)
    elif case.op == "predictions":
        inputs, axes, formula = [u, weight], ["bik", "ijdk", "bijd"], reference.predictions
        (u_hat,) = emulated.call("predictions", u, weight, **device)
        grads = emulated.call(
            "predictions_backward", backward(upstream(u_hat)), u, weight, True, True, **device
        )
        got = {"value": u_hat, "gradient 0": grads[0], "gradient 1": grads[1]}
    elif case.op == "dynamic_routing":
        u_hat, bias = map(place, routing_inputs(shape, options.bias, dtype), "ub")
        inputs, axes = [u_hat, bias], ["bijd", "jd", "bjd"]
        got = dynamic_routing(emulated, inputs, options, backward, **device)

        def formula(u_hat: Tensor, bias: Tensor | None) -> Tensor:
            return reference.dynamic_routing(u_hat, bias, **options.keywords())
    else:
        inputs, axes = [u, weight, bias], ["bik", "ijdk", "jd", "bij" if case.op == "couplings" else "bjd"]
        if case.op == "couplings":
            (c,) = emulated.call("couplings", *inputs, options.iterations, options.leaky, **device)
            got = {"value": c}
        else:
            got = capsule_routing(emulated, inputs, options, backward, **device)

        def formula(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if case.precision == "tf32" and u.dtype == torch.float32:
                u, weight = to_tf32(u), to_tf32(weight)
            if case.op == "couplings":
                return reference.couplings(u, weight, bias, **routing)
            return reference.capsule_routing(u, weight, bias, **options.keywords())

    needs = case.op != "couplings"
    exact = value_and_gradients(
        formula,
        [None if x is None else x.double() for x in inputs],
        lambda value: upstream(value.to(dtype)).double(),
        [needs and x is not None for x in inputs],
    )
    lows = runs_in_orders_of_all_axes(formula, inputs, axes, needs)
    assert_all_low_precision(got, lows, exact)
