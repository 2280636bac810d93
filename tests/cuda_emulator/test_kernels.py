"""Every CUDA kernel against the reference, on the emulated device."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from capsops import reference
from tests.capsops.cases import (
    LOW_PRECISION,
    Options,
    Shape,
    layer_inputs,
    routing_inputs,
    runs_in_other_orders,
    value_and_gradients,
)
from tests.capsops.compare import assert_all_low_precision, assert_low_precision
from tests.cuda_emulator.emulated import Emulated

Run = dict[str, Tensor]


def check(
    got: Run,
    formula: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    axes: Sequence[int | None] | None = None,
    needs: Sequence[bool] | None = None,
) -> None:
    """At most twice the error of the formula in plain torch, gradients three times.

    With `axes`, where the input capsules lie, plain torch's error is that of several orders of summation.
    """
    exact = value_and_gradients(formula, [None if x is None else x.double() for x in inputs], needs=needs)
    if axes is None:
        lows = [value_and_gradients(formula, inputs, needs=needs)]
    else:
        lows = runs_in_other_orders(formula, inputs, axes, None, needs)
    assert_all_low_precision(got, lows, exact)


def upstream(value: Tensor) -> Tensor:
    """That of value_and_gradients."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(value.shape, generator=draw, dtype=torch.float64).to(value.dtype)


def capsule_routing(
    emulated: Emulated, inputs: Sequence[Tensor | None], options: Options, **device: int | bool
) -> Run:
    """Value and gradients by the kernels."""
    u, weight, bias = inputs
    v, s = emulated.call("capsule_routing", u, weight, bias, options.iterations, options.leaky, **device)
    grads = emulated.call(
        "capsule_routing_backward",
        *(upstream(v), u, weight, s, options.iterations, options.leaky, options.detach, True, True),
        **device,
    )
    named = {f"gradient {n}": grad for n, grad in enumerate(grads) if inputs[n] is not None}
    return {"value": v, **named}


def dynamic_routing(emulated: Emulated, inputs: Sequence[Tensor | None], options: Options) -> Run:
    u_hat, bias = inputs
    v, s = emulated.call("dynamic_routing", u_hat, bias, options.iterations, options.leaky)
    grads = emulated.call(
        "dynamic_routing_backward",
        *(upstream(v), u_hat, s, options.iterations, options.leaky, options.detach),
    )
    named = {f"gradient {n}": grad for n, grad in enumerate(grads) if inputs[n] is not None}
    return {"value": v, **named}


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((3, 16), 1),
        ((7, 5, 8), 2),
        ((5, 3), 1),
        ((2, 1), 1),
        ((33, 7), 0),
        ((3, 19, 5), 1),
        ((2, 200), 1),
        ((4,), 0),
    ],
)
def test_squash(emulated: Emulated, shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    s = torch.randn(shape, dtype=torch.float64).to(dtype)
    (v,) = emulated.call("squash", s, dim)
    (grad,) = emulated.call("squash_backward", upstream(v), s, dim)
    check({"value": v, "gradient 0": grad}, lambda x: reference.squash(x, dim), [s])


def test_squash_of_extremes(emulated: Emulated) -> None:
    """Zero, lengths whose squares leave float32, infinity and NaN."""
    s = torch.tensor([[0, 0], [3e38, 3e38], [1e-30, 0], [1e-45, 1e-45], [torch.inf, 0], [torch.nan, 1]])
    (v,) = emulated.call("squash", s, 1)
    torch.testing.assert_close(v[:4], reference.squash(s[:4]))
    assert v[4:].isnan().any(1).all()
    (grad,) = emulated.call("squash_backward", torch.ones_like(s), s, 1)
    assert grad[:4].isfinite().all()
    assert torch.equal(grad[0], torch.zeros(2))
    assert grad[4:].isnan().any(1).all()


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize(
    "shape", [Shape(5, 3, 2, 4, 8), Shape(9, 2, 3, 5, 3), Shape(1, 1, 1, 1, 1), Shape(3, 2, 5, 8, 19)]
)
def test_predictions(emulated: Emulated, shape: Shape, dtype: torch.dtype) -> None:
    u, weight, _ = layer_inputs(shape, dtype=dtype)
    (u_hat,) = emulated.call("predictions", u, weight)
    grads = emulated.call("predictions_backward", upstream(u_hat), u, weight, True, True)
    got = {"value": u_hat, "gradient 0": grads[0], "gradient 1": grads[1]}
    check(got, reference.predictions, [u, weight])


SHAPES = [
    *(Shape(1, 1, 1, 1, 1), Shape(3, 7, 3, 5, 3), Shape(2, 5, 2, 40, 9)),
]
OPTIONS = [
    Options(0, bias=True),
    Options(1, leaky=True),
    Options(2, leaky=True, detach=True, bias=True),
    Options(3, bias=True),
    Options(4, leaky=True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_capsule_routing(emulated: Emulated, shape: Shape, options: Options) -> None:
    inputs = layer_inputs(shape, options.bias, torch.float32)
    got = capsule_routing(emulated, inputs, options)
    check(got, lambda *x: reference.capsule_routing(*x, **options.keywords()), inputs, [1, 0, None])


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [Shape(3, 7, 3, 5, 1), Shape(2, 9, 2, 40, 1)], ids=str)
def test_dynamic_routing(emulated: Emulated, shape: Shape, options: Options, dtype: torch.dtype) -> None:
    inputs = routing_inputs(shape, options.bias, dtype)
    got = dynamic_routing(emulated, inputs, options)
    check(got, lambda *x: reference.dynamic_routing(*x, **options.keywords()), inputs, [1, None])


def couplings_in_orders(inputs: Sequence[Tensor | None], options: Options) -> tuple[Tensor, list[Tensor]]:
    """The exact couplings, and those of plain torch for several orders of the sums over d."""
    keywords = {"iterations": options.iterations, "leaky": options.leaky}
    exact = reference.couplings(*(None if x is None else x.double() for x in inputs), **keywords)
    u, weight, bias = inputs
    dims = weight.shape[2]
    orders = (torch.arange(dims), torch.arange(dims).flip(0), torch.randperm(dims))
    return exact, [
        reference.couplings(u, weight[:, :, order], None if bias is None else bias[:, order], **keywords)
        for order in orders
    ]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_couplings(emulated: Emulated, shape: Shape, options: Options) -> None:
    inputs = layer_inputs(shape, options.bias, torch.float32)
    u, weight, bias = inputs
    (c,) = emulated.call("couplings", u, weight, bias, options.iterations, options.leaky)
    exact, lows = couplings_in_orders(inputs, options)
    assert_low_precision(c, lows, exact, 2)
