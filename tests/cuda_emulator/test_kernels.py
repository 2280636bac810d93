"""Every CUDA kernel against the reference, on the emulated device."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from capsops import reference
from tests.capsops.cases import (
    LAYOUTS,
    LOW_PRECISION,
    Options,
    Shape,
    layer_inputs,
    routing_inputs,
    runs_in_other_orders,
    to_tf32,
    value_and_gradients,
)
from tests.capsops.compare import assert_all_low_precision, assert_low_precision
from tests.cuda_emulator.emulated import Emulated
from tests.tiers import slow

Run = dict[str, Tensor]
Layout = Callable[[Tensor], Tensor]


def check(
    got: Run,
    formula: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    axes: Sequence[int | None] | None = None,
    needs: Sequence[bool] | None = None,
) -> None:
    """The error is at most twice that of the formula in plain torch, or three times for gradients.

    With `axes`, those of the input capsules, several orders of summation in plain torch are compared with.
    """
    exact = value_and_gradients(formula, [None if x is None else x.double() for x in inputs], needs=needs)
    if axes is None:
        lows = [value_and_gradients(formula, inputs, needs=needs)]
    else:
        lows = runs_in_other_orders(formula, inputs, axes, None, needs)
    assert_all_low_precision(got, lows, exact)


def upstream(value: Tensor) -> Tensor:
    """The upstream gradient that value_and_gradients uses."""
    rng = torch.Generator().manual_seed(1)
    return torch.randn(value.shape, generator=rng, dtype=torch.float64).to(value.dtype)


def as_it_is(x: Tensor) -> Tensor:
    return x


def capsule_routing(
    emulated: Emulated,
    inputs: Sequence[Tensor | None],
    options: Options,
    layout: Layout = as_it_is,
    **device: int | bool,
) -> Run:
    """Value and gradients by the kernels; `layout` is applied to the other inputs of backward."""
    u, weight, bias = inputs
    v, s = emulated.call(
        "capsule_routing", u, weight, bias, None, None, options.iterations, options.leaky, True, **device
    )
    grads = emulated.call(
        "capsule_routing_backward",
        *(
            layout(upstream(v)),
            u,
            weight,
            None,
            None,
            layout(s),
            options.iterations,
            options.leaky,
            options.detach,
            True,
            True,
            True,
            False,
        ),
        **device,
    )
    named = {f"gradient {n}": grad for n, grad in enumerate(grads[: len(inputs)]) if inputs[n] is not None}
    return {"value": v, **named}


def dynamic_routing(
    emulated: Emulated,
    inputs: Sequence[Tensor | None],
    options: Options,
    layout: Layout = as_it_is,
    **device: int | bool,
) -> Run:
    u_hat, bias = inputs
    v, s = emulated.call(
        "dynamic_routing", u_hat, bias, None, None, options.iterations, options.leaky, True, **device
    )
    grads = emulated.call(
        "dynamic_routing_backward",
        *(layout(upstream(v)), u_hat, None, None, layout(s)),
        *(options.iterations, options.leaky, options.detach, True, False),
        **device,
    )
    named = {f"gradient {n}": grad for n, grad in enumerate(grads[: len(inputs)]) if inputs[n] is not None}
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


# D = 40 uses the general kernels, the rest the fused ones.
SHAPES = [
    Shape(1, 1, 1, 1, 1),
    Shape(2, 5, 2, 40, 9),
    Shape(6, 9, 20, 6, 8),
    Shape(5, 9, 3, 4, 2),
    Shape(9, 5, 4, 30, 17),
    Shape(17, 6, 10, 16, 8),
    Shape(40, 11, 2, 8, 16),
]
OPTIONS = [
    Options(0, bias=True),
    Options(1, leaky=True),
    Options(2, leaky=True, detach=True, bias=True),
    Options(3, bias=True),
    Options(4, leaky=True),
    Options(5, bias=True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_capsule_routing(emulated: Emulated, shape: Shape, options: Options) -> None:
    inputs = layer_inputs(shape, options.bias, torch.float32)
    got = capsule_routing(emulated, inputs, options)
    check(got, lambda *x: reference.capsule_routing(*x, **options.keywords()), inputs, [1, 0, None])


@pytest.mark.parametrize(("D", "iterations"), [(4, 6), (12, 7), (20, 5)])
def test_more_passes_than_registers_hold(emulated: Emulated, D: int, iterations: int) -> None:
    inputs = layer_inputs(Shape(5, 9, 3, D, 2), True, torch.float32)
    got = capsule_routing(emulated, inputs, Options(iterations))
    check(got, lambda *x: reference.capsule_routing(*x, iterations=iterations), inputs, [1, 0, None])


def test_more_passes_than_shared_memory_holds(emulated: Emulated) -> None:
    """On a small device the general kernels compute the gradient; the forward passes are still fused."""
    inputs = layer_inputs(Shape(2, 3, 2, 4, 2), True, torch.float32)
    got = capsule_routing(emulated, inputs, Options(40), shared_per_block=4096)
    check(got, lambda *x: reference.capsule_routing(*x, iterations=40), inputs, [1, 0, None])


@pytest.mark.parametrize("where", ["u", "weight"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38, 1e30, 1e-30])
def test_float32_of_any_size(emulated: Emulated, value: float, where: str) -> None:
    """float32 is made of products in TF32, but infinities, NaN and numbers of any size give what they give in
    float32: s of the first pass, and all of the other samples or output capsules.
    """
    u, weight, _ = layer_inputs(Shape(20, 9, 10, 16, 8), False, torch.float32)
    u[5] *= 1e-30
    changed = {"u": u[3, 2], "weight": weight[2, 1, 3]}[where]
    changed[4] = value
    for iterations in (0, 1, 3):
        v, s = emulated.call("capsule_routing", u, weight, None, None, None, iterations, False, True)
        plain = torch.einsum("bik,ijdk->bjd", u, weight) / (10 if iterations else 1)
        size = torch.einsum("bik,ijdk->bjd", u.double().abs(), weight.double().abs())
        assert torch.equal(s[0].isnan(), plain.isnan())
        assert torch.equal(s[0].isposinf(), plain.isposinf())
        assert torch.equal(s[0].isneginf(), plain.isneginf())
        finite = plain.isfinite()
        assert ((s[0] - plain).abs() <= 1e-6 * size)[finite].all()
        others = [b for b in range(20) if where == "u" and b != 3]
        exact = reference.capsule_routing(u.double(), weight.double(), iterations=iterations)
        torch.testing.assert_close(v[others].double(), exact[others], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precomputed", [False, True])
def test_no_sums_of_the_softmax_in_memory(emulated: Emulated, precomputed: bool) -> None:
    """With few output capsules nothing in the workspace of backward grows with I but the arranged operands:
    u, and W in two parts.
    """
    emulated.device.set()
    B, I, J, D, K = 64, 20000, 10, 16, 8  # noqa: E741
    u, weight = (
        (16, 4 * B * I * (J * D if precomputed else K)),
        (0, 0) if precomputed else (16, 4 * I * J * D * K),
    )
    grad, s, grad_bias = (16, 4 * B * J * D), (16, 4 * 3 * B * J * D), (16, 4 * J * D)
    takes = emulated.extension.routing_backward(  # without workspace: it only says how much it takes
        *(grad, u, weight, s, u, weight, grad_bias, None, B, I, J, D, K, 3),
        *(False, False, True, 0, False, (0, 0), 0, 0),
    )
    operands = 0 if precomputed else u[1] + 2 * weight[1]
    assert takes < operands + 4 * B * I


SOME = [Options(0), Options(3, leaky=True, bias=True), Options(3, detach=True), Options(5)]
SOME_SHAPES = [Shape(5, 6, 18, 3, 3), Shape(18, 5, 10, 16, 8), Shape(17, 3, 3, 20, 20)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", SOME, ids=str)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_capsule_routing_in_16_bit(
    emulated: Emulated, shape: Shape, options: Options, dtype: torch.dtype
) -> None:
    inputs = layer_inputs(shape, options.bias, dtype)
    got = capsule_routing(emulated, inputs, options)
    check(got, lambda *x: reference.capsule_routing(*x, **options.keywords()), inputs, [1, 0, None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_16_bit_are_float32(emulated: Emulated, dtype: torch.dtype) -> None:
    """Only the inputs and v are rounded to 16 bits: s has the accuracy of float32."""
    u, weight, bias = layer_inputs(Shape(18, 35, 10, 16, 8), True, dtype)
    _, s = emulated.call("capsule_routing", u, weight, bias, None, None, 3, False, True)
    _, exact = emulated.call(
        "capsule_routing", u.float(), weight.float(), bias.float(), None, None, 3, False, True
    )
    assert (s - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2**-15), (torch.float16, 2**-20)])
def test_sums_of_precomputed_16_bit(emulated: Emulated, dtype: torch.dtype, bound: float) -> None:
    """V is passed to the tensor cores in two parts, so the logits are far more accurate than the dtype."""
    u_hat, bias = routing_inputs(Shape(2, 37, 10, 16, 1), True, dtype)
    _, s = emulated.call("dynamic_routing", u_hat, bias, None, None, 3, False, True)
    _, exact = emulated.call("dynamic_routing", u_hat.float(), bias.float(), None, None, 3, False, True)
    assert (s - exact).norm() < bound * exact.norm()


@pytest.mark.parametrize("options", SOME, ids=str)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_capsule_routing_in_tf32(
    emulated: Emulated, shape: Shape, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If torch's setting allows TF32, the error is that of plain torch on inputs rounded to TF32."""
    monkeypatch.setattr(emulated.implementation, "_allows_tf32", lambda: True)
    inputs = layer_inputs(shape, options.bias, torch.float32)
    got = capsule_routing(emulated, inputs, options)

    def formula(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if u.dtype == torch.float32:
            u, weight = to_tf32(u), to_tf32(weight)
        return reference.capsule_routing(u, weight, bias, **options.keywords())

    check(got, formula, inputs, [1, 0, None])
    exact = value_and_gradients(formula, [None if x is None else x.double() for x in inputs])["value"]
    assert (got["value"] - exact).abs().max() > 1e-5  # TF32 was used


@pytest.mark.parametrize(
    "device",
    [
        {"multiprocessors": 1},
        {"multiprocessors": 16},
        {"cooperative": False},
        {"shared_per_block": 16 * 1024},
        {"shared_per_block": 64 * 1024, "multiprocessors": 2},
    ],
    ids=str,
)
def test_capsule_routing_on_other_devices(emulated: Emulated, device: dict[str, int | bool]) -> None:
    """More work than blocks, splits of every axis, a launch for each step, little shared memory."""
    for shape, options in (
        (Shape(70, 13, 3, 5, 8), Options(3, bias=True)),
        (Shape(3, 19, 18, 16, 8), Options(2, leaky=True)),
    ):
        inputs = layer_inputs(shape, options.bias, torch.float32)
        got = capsule_routing(emulated, inputs, options, **device)
        check(got, lambda *x, o=options: reference.capsule_routing(*x, **o.keywords()), inputs, [1, 0, None])


def test_gradients_that_are_not_needed(emulated: Emulated) -> None:
    u, weight, _ = layer_inputs(Shape(5, 6, 3, 4, 8), dtype=torch.float32)
    v, s = emulated.call("capsule_routing", u, weight, None, None, None, 3, False, True)
    arguments = (upstream(v), u, weight, None, None, s, 3, False, False, True)
    every = emulated.call("capsule_routing_backward", *arguments, True, True, False)
    for needs in ((True, False), (False, True), (False, False)):
        some = emulated.call("capsule_routing_backward", *arguments, *needs, False)
        for n in range(3):
            assert torch.equal(some[n], every[n] if n == 2 or needs[n] else torch.empty(0))


def test_inputs_that_are_not_aligned(emulated: Emulated) -> None:
    """Contiguous but at an odd address: numbers are copied one by one instead of 16 bytes at a time."""
    inputs = layer_inputs(Shape(5, 6, 3, 16, 8), True, torch.bfloat16)
    expected = capsule_routing(emulated, inputs, Options(3))
    offset = LAYOUTS["offset"]
    got = capsule_routing(emulated, [offset(x) for x in inputs], Options(3), offset)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_values_that_are_not_finite(emulated: Emulated, bad: float) -> None:
    """They reach the results of the samples that have them, and no others."""
    inputs = layer_inputs(Shape(20, 6, 3, 4, 8), dtype=torch.float32)
    inputs[0][17, 3, 5] = bad
    got = capsule_routing(emulated, inputs, Options(3))
    others = torch.arange(20) != 17
    assert got["value"][others].isfinite().all()
    assert not got["value"][17].isfinite().any()
    assert got["gradient 0"][others].isfinite().all()
    assert not got["gradient 0"][17].isfinite().any()
    assert not got["gradient 1"].isfinite().any()


def test_float64_is_declined(emulated: Emulated) -> None:
    reason = emulated.implementation.BACKEND.why_declined("squash", torch.float64, frozenset())
    assert reason == "impl='cuda' takes tensors of float32, bfloat16, float16, got float64"


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, 9, 2, 40, 1),
        Shape(3, 7, 3, 5, 1),
        Shape(33, 5, 2, 8, 1),
        Shape(2, 37, 10, 16, 1),
        Shape(5, 4, 14, 16, 1),
        Shape(5, 9, 4, 24, 1),
    ],
    ids=str,
)
def test_dynamic_routing(emulated: Emulated, shape: Shape, options: Options, dtype: torch.dtype) -> None:
    inputs = routing_inputs(shape, options.bias, dtype)
    got = dynamic_routing(emulated, inputs, options)
    check(got, lambda *x: reference.dynamic_routing(*x, **options.keywords()), inputs, [1, None])


@pytest.mark.parametrize(
    ("shape", "dtype", "device"),
    [
        (Shape(2, 700, 3, 8, 1), torch.float32, {"shared_per_block": 64 * 1024}),
        slow(Shape(2, 600, 10, 13, 1), torch.bfloat16, {"shared_per_block": 220 * 1024}),
        slow(Shape(2, 333, 9, 16, 1), torch.float16, {"shared_per_block": 220 * 1024}),
        (Shape(3, 9, 10, 16, 1), torch.float32, {"multiprocessors": 16}),
        (Shape(3, 9, 4, 7, 1), torch.float16, {"multiprocessors": 16, "cooperative": False}),
    ],
    ids=str,
)
def test_dynamic_routing_on_other_devices(
    emulated: Emulated, shape: Shape, dtype: torch.dtype, device: dict[str, int | bool]
) -> None:
    """Less shared memory than a sample's predictions need, so that slots are reused; too few samples."""
    for options in (Options(4, bias=True), Options(3, leaky=True)):
        inputs = routing_inputs(shape, options.bias, dtype)
        got = dynamic_routing(emulated, inputs, options, **device)
        check(got, lambda *x, o=options: reference.dynamic_routing(*x, **o.keywords()), inputs, [1, None])


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (Shape(16, 100, 12, 24, 1), torch.bfloat16),
        (Shape(32, 40, 5, 24, 1), torch.bfloat16),
        (Shape(16, 8, 12, 17, 1), torch.float16),
        (Shape(16, 24, 10, 20, 1), torch.float16),
        (Shape(32, 40, 5, 24, 1), torch.float16),
    ],
    ids=str,
)
def test_dynamic_routing_of_three_tiles_of_d(emulated: Emulated, shape: Shape, dtype: torch.dtype) -> None:
    """The kernels read four tiles, and the numbers beyond D must be 0.

    If rows were shorter than four tiles, the last one would extend into the logits, whose bits are sometimes
    NaN when read as 16-bit numbers.
    """
    options = Options(3, bias=True)
    inputs = routing_inputs(shape, options.bias, dtype)
    got = dynamic_routing(emulated, inputs, options, multiprocessors=1)
    check(got, lambda *x: reference.dynamic_routing(*x, **options.keywords()), inputs, [1, None])


def test_slots_are_reused(emulated: Emulated) -> None:
    """In the two cases above that test it."""
    for B, I, J, D, element, kilobytes in ((2, 700, 3, 8, 4, 64), (2, 600, 10, 13, 2, 220)):  # noqa: E741
        plan = emulated.extension.smem_cached_plan(
            B, I, J, D, element, 3, multiprocessors=3, shared_per_block=kilobytes * 1024
        )
        assert plan["warps"] * plan["slots"] < plan["sets"]


def test_dynamic_routing_with_more_passes_than_registers_hold(emulated: Emulated) -> None:
    inputs = routing_inputs(Shape(5, 9, 3, 12, 1), True, torch.float32)
    got = dynamic_routing(emulated, inputs, Options(7))
    check(got, lambda *x: reference.dynamic_routing(*x, iterations=7), inputs, [1, None])


def couplings_in_orders(inputs: Sequence[Tensor | None], options: Options) -> tuple[Tensor, list[Tensor]]:
    """The exact couplings, and those of plain torch with several orders of the sums over i and d."""
    keywords = {"iterations": options.iterations, "leaky": options.leaky}
    exact = reference.couplings(*(None if x is None else x.double() for x in inputs), **keywords)
    u, weight, bias = inputs
    lows = []
    for _ in range(6):
        i, d = torch.randperm(weight.shape[0]), torch.randperm(weight.shape[2])
        permuted = None if bias is None else bias[:, d]
        c = reference.couplings(u[:, i], weight[i][:, :, d], permuted, **keywords)
        lows.append(c[:, i.argsort()])
    return exact, lows


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_couplings(emulated: Emulated, shape: Shape, options: Options) -> None:
    inputs = layer_inputs(shape, options.bias, torch.float32)
    u, weight, bias = inputs
    (c,) = emulated.call("couplings", u, weight, bias, None, None, options.iterations, options.leaky)
    exact, lows = couplings_in_orders(inputs, options)
    assert_low_precision(c, lows, exact, 2)
