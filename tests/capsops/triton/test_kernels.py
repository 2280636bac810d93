"""Every kernel against the reference, under Triton's interpreter.

The interpreter is switched on before Triton is imported, so these tests need a separate process, started by
test_interpreter.py or by hand:
`TRITON_INTERPRET=1 pytest tests/capsops/triton/test_kernels.py`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import capsops
from capsops import dispatch, reference
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
from tests.tiers import slow

pytest.importorskip("triton", minversion="3.6", reason="Triton 3.6 or newer is not installed")
triton_kernels = pytest.importorskip("capsops.backends.triton")
if triton_kernels.BACKEND.unavailable or "cpu" not in triton_kernels.BACKEND.devices:
    reason = triton_kernels.BACKEND.unavailable or "Triton's interpreter is off"
    pytest.skip(reason, allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from capsops.backends.triton import capsules, launch  # noqa: E402

# Sizes that no block size divides; D, K and J smaller and larger than a block; several blocks of each axis.
SHAPES = [
    Shape(5, 9, 10, 16, 8),
    Shape(3, 17, 3, 4, 4),
    Shape(1, 7, 11, 8, 16),
    Shape(2, 33, 2, 3, 5),
    Shape(66, 3, 5, 4, 3),
    Shape(13, 2, 2, 40, 20),
]
FEW_OPTIONS = [
    Options(0, bias=True),
    Options(1, leaky=True),
    Options(2, leaky=True, detach=True, bias=True),
    Options(3, bias=True),
]
ALL_OPTIONS = [
    slow(Options(*option)) if option[0] == 4 else Options(*option)
    for option in product(range(5), *[(False, True)] * 3)
]
SMALL = Shape(3, 5, 3, 4, 4)


def dtypes_by_shape(shapes: list[Shape]) -> list[Any]:
    """Every shape in every dtype; in 16 bits all shapes but the first are slow."""
    return [
        slow(shape, dtype) if dtype != torch.float32 and n > 0 else (shape, dtype)
        for n, shape in enumerate(shapes)
        for dtype in LOW_PRECISION
    ]


def routing_cases(shapes: list[Shape]) -> list[Any]:
    """The same with FEW_OPTIONS. Three passes take the most time: all but two shapes in float32 are slow."""

    def is_slow(n: int, dtype: torch.dtype, options: Options) -> bool:
        wide, three = dtype == torch.float32, options.iterations == 3
        return n > 1 or not wide if three else n > 0 and not wide

    return [
        slow(shape, dtype, options) if is_slow(n, dtype, options) else (shape, dtype, options)
        for n, shape in enumerate(shapes)
        for dtype, options in product(LOW_PRECISION, FEW_OPTIONS)
    ]


NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fills uninitialised memory with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def matrix_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts 13 bits off the operands of TF32 products, as a matrix unit does.

    The interpreter keeps all bits, so that a kernel that does not round its operands would seem to be right.
    """

    def cut(x: Any) -> Any:
        return interpreter.TensorHandle((x.data.view(np.int32) & -0x2000).view(np.float32), x.dtype)

    def create_dot(self: Any, x: Any, y: Any, sums: Any, precision: Any, *rest: Any) -> Any:
        if precision.name == "TF32":
            x, y = cut(x), cut(y)
        return original(self, x, y, sums, precision, *rest)

    original = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def layer(options: Options, impl: str = "triton") -> Callable[..., Tensor]:
    return partial(capsops.capsule_routing, impl=impl, **options.keywords())


def plain_layer(options: Options) -> Callable[..., Tensor]:
    return partial(reference.capsule_routing, **options.keywords())


def routing(options: Options) -> Callable[..., Tensor]:
    return partial(capsops.dynamic_routing, impl="triton", **options.keywords())


def plain_routing(options: Options) -> Callable[..., Tensor]:
    return partial(reference.dynamic_routing, **options.keywords())


def double(inputs: Any) -> list[Tensor | None]:
    return [None if x is None else x.double() for x in inputs]


def upstream_of(shape: Shape, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape.B, shape.J, shape.D).to(dtype)


def check_layer(shape: Shape, options: Options, dtype: torch.dtype) -> None:
    inputs, upstream = layer_inputs(shape, options.bias, dtype), upstream_of(shape, dtype)
    assert_all_low_precision(
        value_and_gradients(layer(options), inputs, upstream),
        runs_in_other_orders(plain_layer(options), inputs, (1, 0, None), upstream),
        value_and_gradients(plain_layer(options), double(inputs), upstream.double()),
    )


def check_routing(shape: Shape, options: Options, dtype: torch.dtype) -> None:
    inputs, upstream = routing_inputs(shape, options.bias, dtype), upstream_of(shape, dtype)
    assert_all_low_precision(
        value_and_gradients(routing(options), inputs, upstream),
        runs_in_other_orders(plain_routing(options), inputs, (1, None), upstream),
        value_and_gradients(plain_routing(options), double(inputs), upstream.double()),
    )


def test_memory_is_poisoned() -> None:
    for x in (torch.empty(3), torch.ones(3).new_empty(3), torch.empty_like(torch.ones(3))):
        assert x.isnan().all()


def test_the_interpreter_supports_cpu_tensors() -> None:
    assert ("triton", "cpu", True, "") in dispatch.describe()
    assert dispatch.requested("triton", "cpu") == "triton"


@pytest.mark.parametrize(("shape", "dtype", "options"), routing_cases(SHAPES), ids=str)
def test_capsule_routing(shape: Shape, options: Options, dtype: torch.dtype) -> None:
    check_layer(shape, options, dtype)


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=str)
def test_all_options_of_capsule_routing(options: Options) -> None:
    check_layer(SMALL, options, torch.float32)


@pytest.mark.parametrize(
    ("shape", "dtype", "options"), routing_cases([*SHAPES[:4], Shape(2, 3, 9, 300, 1)]), ids=str
)
def test_dynamic_routing(shape: Shape, options: Options, dtype: torch.dtype) -> None:
    check_routing(shape, options, dtype)


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=str)
def test_all_options_of_dynamic_routing(options: Options) -> None:
    check_routing(SMALL, options, torch.float32)


@pytest.mark.parametrize(("shape", "dtype"), dtypes_by_shape([*SHAPES, Shape(2, 3, 9, 16, 40)]), ids=str)
def test_predictions(shape: Shape, dtype: torch.dtype) -> None:
    inputs = layer_inputs(shape, dtype=dtype)[:2]
    upstream = torch.randn(shape.B, shape.I, shape.J, shape.D).to(dtype)
    assert_all_low_precision(
        value_and_gradients(partial(capsops.predictions, impl="triton"), inputs, upstream),
        [value_and_gradients(reference.predictions, inputs, upstream)],
        value_and_gradients(reference.predictions, double(inputs), upstream.double()),
    )


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize(
    "options", [Options(0), Options(1, leaky=True), Options(2, leaky=True), Options(3)], ids=str
)
@pytest.mark.parametrize("shape", [Shape(5, 9, 10, 16, 8), Shape(2, 17, 3, 3, 5)], ids=str)
def test_couplings(shape: Shape, options: Options, dtype: torch.dtype) -> None:
    inputs = layer_inputs(shape, True, dtype)
    keywords = {"iterations": options.iterations, "leaky": options.leaky}
    assert_low_precision(
        capsops.couplings(*inputs, impl="triton", **keywords),
        [reference.couplings(*inputs, **keywords)],
        reference.couplings(*double(inputs), **keywords),
        factor=2,
    )


LONG = Shape(3, 2, 2, 8, 40)


@pytest.mark.parametrize("options", [Options(1), Options(2, bias=True), Options(2, detach=True)], ids=str)
def test_input_capsules_of_several_blocks(options: Options) -> None:
    check_layer(LONG, options, torch.float32)


def test_couplings_of_input_capsules_of_several_blocks() -> None:
    inputs = layer_inputs(LONG, True, torch.float32)
    assert_low_precision(
        capsops.couplings(*inputs, iterations=2, impl="triton"),
        [reference.couplings(*inputs, iterations=2)],
        reference.couplings(*double(inputs), iterations=2),
        factor=2,
    )


@pytest.mark.parametrize("scale", [1e4, 1e-6])
@pytest.mark.parametrize("needed", ["u", "weight"])
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        (Options(1), torch.float16),
        (Options(1), torch.bfloat16),
        (Options(3), torch.float16),
        slow(Options(3), torch.bfloat16),
    ],
    ids=str,
)
def test_gradients_near_the_ends_of_float16(
    options: Options, needed: str, scale: float, dtype: torch.dtype
) -> None:
    """Intermediate gradients may leave the range of float16 while the result is in it.

    W and u are scaled for that.
    """
    shape = Shape(5, 17, 3, 16, 8)
    u, weight, _ = layer_inputs(shape, dtype=torch.float64)
    scaling = 2.0**8 if (needed == "u") == (scale > 1) else 2.0**-8
    inputs = [(u * scaling).to(dtype), (weight / scaling).to(dtype)]
    upstream = (torch.randn(shape.B, shape.J, shape.D) * scale).to(dtype)
    needs = (needed == "u", needed == "weight")
    got = value_and_gradients(layer(options), inputs, upstream, needs)
    wide = value_and_gradients(plain_layer(options), [x.float() for x in inputs], upstream.float(), needs)
    exact = value_and_gradients(plain_layer(options), double(inputs), upstream.double(), needs)
    lows = [{name: x.to(dtype) for name, x in wide.items()}]
    for name, tensor in exact.items():
        factor = 2 if dtype == torch.float16 else 4  # operands of products are rounded to bfloat16
        assert_low_precision(got[name], [low[name] for low in lows], tensor, factor, name)


@triton.jit
def rounding_kernel(p_x, p_rounded, count, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    b_x = tl.load(p_x + at, mask=at < count, other=0.0)
    tl.store(p_rounded + at, capsules.to_tf32(b_x), mask=at < count)


def rounded(x: Tensor) -> Tensor:
    result = torch.empty_like(x)
    launch.launch(rounding_kernel, 1, x, result, len(x), SIZE=triton.next_power_of_2(len(x)))
    return result


def test_rounding_to_tf32() -> None:
    last = 2.0**-10
    x = [1.0, 1 + 0.49 * last, 1 + 0.51 * last, 1 + last / 2, -1 - last / 2, 1 + 1.5 * last, 2 - last / 4]
    want = [1.0, 1.0, 1 + last, 1 + last, -1 - last, 1 + 2 * last, 2.0]
    assert rounded(torch.tensor(x)).tolist() == want
    x = torch.randn(500) * 10.0 ** torch.randint(-38, 38, (500,))
    assert torch.equal(rounded(x), to_tf32(x))


def test_rounding_to_tf32_of_extremes() -> None:
    """Zeros keep their sign, the largest numbers become infinite, and every NaN stays NaN.

    It stays NaN even without the 13 bits that a matrix unit cuts off.
    """
    largest = (2 - 2.0**-10) * 2.0**127
    x = torch.tensor([0.0, -0.0, 1e-45, INF, -INF, largest, -largest, 3.4028e38, -3.4028e38])
    got = rounded(x)
    assert got.tolist() == [0, 0, 0, INF, -INF, largest, -largest, INF, -INF]
    assert torch.equal(got.signbit(), x.signbit())
    bits = [0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0x7F801000, -1, -0x400000, -0x7FFFFF]
    got = rounded(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
    assert got.isnan().all()
    assert (got.view(torch.int32) & -0x2000).view(torch.float32).isnan().all()


TF32_SHAPES = [Shape(1, 7, 3, 4, 8), Shape(3, 33, 10, 16, 8), Shape(17, 3, 3, 20, 20), *SHAPES]


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        slow(shape, options) if n > (0 if options.iterations == 3 else 2) else (shape, options)
        for (n, shape), options in product(enumerate(TF32_SHAPES), FEW_OPTIONS)
    ],
    ids=str,
)
def test_capsule_routing_in_tf32(shape: Shape, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """If torch's setting allows TF32, the error is that of plain torch on inputs rounded to TF32."""
    monkeypatch.setattr(launch, "_tf32_allowed", lambda: True)
    inputs, upstream = layer_inputs(shape, options.bias, torch.float32), upstream_of(shape, torch.float32)

    def plain(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return plain_layer(options)(to_tf32(u), to_tf32(weight), bias)

    got = value_and_gradients(layer(options), inputs, upstream)
    exact = value_and_gradients(plain_layer(options), double(inputs), upstream.double())
    assert_all_low_precision(got, runs_in_other_orders(plain, inputs, (1, 0, None), upstream), exact)
    assert (got["value"] - exact["value"]).abs().max() > 1e-5  # so TF32 was used


@pytest.mark.parametrize("shape", [SMALL, Shape(33, 3, 3, 20, 20)], ids=str)
def test_predictions_in_tf32(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_tf32_allowed", lambda: True)
    u, weight, _ = layer_inputs(shape, dtype=torch.float32)

    def plain(u: Tensor, weight: Tensor) -> Tensor:
        return reference.predictions(to_tf32(u), to_tf32(weight))

    got = value_and_gradients(partial(capsops.predictions, impl="triton"), [u, weight])
    exact = value_and_gradients(reference.predictions, double([u, weight]))
    assert_all_low_precision(got, [value_and_gradients(plain, [u, weight])], exact)
    assert (got["value"] - exact["value"]).abs().max() > 1e-5


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((33, 7), 1), ((3, 5, 7), 1), ((7,), 0), ((2, 1500), 1), ((1500, 2), 0), ((2, 1, 3), 1)],
)
def test_squash(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    s, upstream = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    assert_all_low_precision(
        value_and_gradients(partial(capsops.squash, dim=dim, impl="triton"), [s], upstream),
        [value_and_gradients(partial(reference.squash, dim=dim), [s], upstream)],
        value_and_gradients(partial(reference.squash, dim=dim), [s.double()], upstream.double()),
    )


@pytest.mark.parametrize("needs", [(True, False, True), (False, True, True), (False, False, True)])
@pytest.mark.parametrize(
    "options", [Options(1, bias=True), Options(3, bias=True), Options(2, detach=True)], ids=str
)
def test_gradients_of_some_inputs_only(options: Options, needs: tuple[bool, ...]) -> None:
    inputs = layer_inputs(SMALL, True, torch.float32)
    got = value_and_gradients(layer(options), inputs, None, needs)
    want = value_and_gradients(layer(options), inputs)
    assert len(got) == 1 + sum(needs)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_changes_nothing(layout: str) -> None:
    arrange, dtype = LAYOUTS[layout], torch.float32
    for function, inputs in (
        (layer(Options(2)), layer_inputs(SMALL, True, dtype)),
        (routing(Options(2)), routing_inputs(SMALL, True, dtype)),
    ):
        strided = [arrange(x) for x in inputs]
        upstream = arrange(upstream_of(SMALL, dtype))
        got = value_and_gradients(function, strided, upstream)
        want = value_and_gradients(function, [x.contiguous() for x in strided], upstream.contiguous())
        for name, tensor in want.items():
            assert torch.equal(got[name], tensor), name


def test_the_same_bits_every_time() -> None:
    inputs = layer_inputs(Shape(66, 5, 2, 4, 4), True, torch.float32)
    first, second = (value_and_gradients(layer(Options(3)), inputs) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("where", ["u", "weight", "bias", "grad"])
@pytest.mark.parametrize(
    ("options", "bad"),
    [
        slow(options, bad) if options.iterations == 3 and bad in (INF, -INF) else (options, bad)
        for options, bad in product([Options(0), Options(1), Options(3, leaky=True)], [NAN, INF, -INF])
    ],
    ids=str,
)
def test_non_finite_values_neither_vanish_nor_spread(options: Options, where: str, bad: float) -> None:
    shape = Shape(17, 5, 3, 4, 3)
    u, weight, bias = layer_inputs(shape, True, torch.float32)
    upstream = upstream_of(shape, torch.float32)
    broken = {"u": u, "weight": weight, "bias": bias, "grad": upstream}[where]
    broken.view(-1)[broken.numel() // 2] = bad
    got = value_and_gradients(layer(options), [u, weight, bias], upstream)
    want = value_and_gradients(plain_layer(options), double([u, weight, bias]), upstream.double())
    for name, tensor in want.items():
        assert torch.equal(got[name].isfinite().all(-1), tensor.isfinite().all(-1)), name


@pytest.mark.parametrize("leaky", [False, True])
def test_large_logits(leaky: bool) -> None:
    """Logits of ±10⁴: the softmax is all or nothing, and no gradient overflows."""
    u, weight, _ = layer_inputs(Shape(5, 7, 3, 4, 3), dtype=torch.float32)
    inputs, options = [u, weight * 1e4], Options(3, leaky=leaky)
    got = value_and_gradients(layer(options), inputs)
    want = value_and_gradients(plain_layer(options), double(inputs))
    torch.testing.assert_close(got["value"].double(), want["value"], rtol=0, atol=1e-4)
    assert all(x.isfinite().all() for x in got.values())


def test_a_coupling_that_underflows_is_zero() -> None:
    u_hat = torch.zeros(5, 40, 2, 1)
    u_hat[:, :, 0], u_hat[:, :, 1] = 1e35, 3e34
    want = reference.dynamic_routing(u_hat, iterations=2)
    assert torch.equal(capsops.dynamic_routing(u_hat, iterations=2, impl="triton"), want)


@pytest.mark.parametrize("size", [3e38, 1e-38])
def test_squash_at_the_ends_of_the_range(size: float) -> None:
    s = torch.full((3, 8), size, requires_grad=True)
    v = capsops.squash(s, impl="triton")
    torch.testing.assert_close(v, reference.squash(s.double()).float(), rtol=1e-6, atol=0)
    v.sum().backward()
    assert s.grad.isfinite().all()


def test_squash_of_zero() -> None:
    s = torch.zeros(3, 4, requires_grad=True)
    v = capsops.squash(s, impl="triton")
    v.sum().backward()
    assert torch.equal(v, torch.zeros(3, 4))
    assert torch.equal(s.grad, torch.zeros(3, 4))


def test_float64_is_not_supported() -> None:
    message = r"^impl='triton' takes tensors of float32, bfloat16, float16, got float64$"
    u, weight, bias = layer_inputs(SMALL, True)
    for call in (
        lambda: capsops.squash(u, impl="triton"),
        lambda: capsops.predictions(u, weight, impl="triton"),
        lambda: capsops.dynamic_routing(torch.randn(2, 3, 4, 5).double(), impl="triton"),
        lambda: capsops.capsule_routing(u, weight, bias, impl="triton"),
        lambda: capsops.couplings(u, weight, bias, impl="triton"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


class Extras(NamedTuple):
    """What a routing call has beside Options."""

    logits: str = ""  # the axes of the starting logits, of B, I and J
    closed: bool = False  # some pairs are closed, and all of the first input capsule's
    mask: bool = False  # some input capsules are absent
    squash_output: bool = True

    def __str__(self) -> str:
        flags = [name for name in ("closed", "mask") if getattr(self, name)]
        return "-".join([f"logits{self.logits}", *flags, *([] if self.squash_output else ["unsquashed"])])


KINDS = ["layer", "shared", "stored", "alike"]
EXTRAS = [
    (Shape(5, 9, 3, 9, 5), Options(3, bias=True), Extras("BIJ", closed=True, mask=True, squash_output=False)),
    (Shape(17, 33, 2, 3, 5), Options(2, leaky=True, bias=True), Extras("IJ", closed=True)),
    (Shape(3, 7, 1, 5, 3), Options(2, bias=True), Extras("BIJ", closed=True, mask=True)),
    (Shape(3, 5, 3, 4, 4), Options(0, bias=True), Extras("IJ", closed=True, mask=True)),
    (Shape(3, 7, 2, 5, 3), Options(3, bias=True), Extras(mask=True, squash_output=False)),
    (Shape(17, 33, 11, 5, 7), Options(3, bias=True), Extras("IJ", mask=True)),
    (Shape(3, 7, 3, 9, 5), Options(1, bias=True), Extras("BIJ", closed=True, squash_output=False)),
    (Shape(1, 7, 2, 5, 3), Options(2, detach=True, bias=True), Extras("BJ", mask=True)),
    (Shape(3, 1, 40, 3, 3), Options(3, leaky=True, detach=True, bias=True), Extras("J")),
    (Shape(5, 7, 3, 5, 3), Options(2, leaky=True, bias=True), Extras("BI", mask=True)),
    (Shape(3, 7, 2, 5, 3), Options(2, leaky=True, bias=True), Extras("I", squash_output=False)),
    (Shape(3, 7, 1, 5, 3), Options(1, leaky=True, bias=True), Extras("B", mask=True)),
    (Shape(3, 7, 2, 5, 3), Options(0, bias=True), Extras("BIJ", closed=True, squash_output=False)),
    (Shape(3, 7, 2, 5, 3), Options(0, bias=True), Extras(mask=True)),
    (Shape(3, 7, 2, 5, 3), Options(1, leaky=True, bias=True), Extras(mask=True)),
    (Shape(1, 3, 66, 5, 70), Options(2, bias=True), Extras("IJ", closed=True)),
    (Shape(3, 3, 66, 70, 5), Options(2, detach=True, bias=True), Extras("BIJ", closed=True, mask=True)),
]
FAST_EXTRAS = 5  # of them, in float32; of all but the first, in one kind


def extra_inputs(kind: str, shape: Shape, extras: Extras, dtype: torch.dtype) -> list[Tensor | None]:
    """u and W, or û; bias, logits and mask. What is not there is NaN."""
    B, I, J, D, _ = shape  # noqa: E741
    u, weight, bias = layer_inputs(shape, True, torch.float64)
    if kind in ("stored", "alike"):
        u = torch.randn(*((B, I, J, D) if kind == "stored" else (B, I, D)), dtype=torch.float64)
    logits = mask = None
    if extras.logits:
        sizes = [n if axis in extras.logits else 1 for n, axis in zip((B, I, J), "BIJ", strict=True)]
        logits = torch.randn(sizes, dtype=torch.float64)
        if extras.closed:
            logits[torch.rand(sizes) < 0.3] = -INF
            logits[:, 0] = -INF
    if extras.mask:
        mask = torch.rand(B, I) < 0.7
        mask[0, -1] = False
        u[~mask] = NAN
    weights = {"layer": [weight], "shared": [weight[0]]}.get(kind, [])
    inputs = [None if x is None else x.to(dtype) for x in (u, *weights, bias, logits)]
    return [*inputs, mask]


def with_extras(
    module: Any, kind: str, options: Options, extras: Extras, **impl: str
) -> Callable[..., Tensor]:
    op = module.capsule_routing if kind in ("layer", "shared") else module.dynamic_routing

    def call(*inputs: Tensor | None) -> Tensor:
        *first, logits, mask = inputs
        keywords = {"logits": logits, "mask": mask, "squash_output": extras.squash_output}
        return op(*first, **keywords, **options.keywords(), **impl)

    return call


def doubled(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [x.double() if x is not None and x.is_floating_point() else x for x in inputs]


@pytest.mark.parametrize(
    ("shape", "options", "extras", "kind", "dtype"),
    [
        (*case, kind, dtype)
        if dtype == torch.float32 and (n == 0 or (n < FAST_EXTRAS and kind == KINDS[n % 4]))
        else slow(*case, kind, dtype)
        for (n, case), kind, dtype in product(enumerate(EXTRAS), KINDS, LOW_PRECISION)
    ],
    ids=str,
)
def test_logits_mask_and_shared_weights(
    shape: Shape, options: Options, extras: Extras, kind: str, dtype: torch.dtype
) -> None:
    inputs, upstream = extra_inputs(kind, shape, extras, dtype), upstream_of(shape, dtype)
    *_, logits, mask = inputs
    ours = with_extras(capsops, kind, options, extras, impl="triton")
    plain = with_extras(reference, kind, options, extras)
    # Without routing the value does not depend on finite logits.
    needs = [x is not None and x.is_floating_point() for x in inputs]
    needs[-2] &= options.iterations > 0
    axes: list[int | None] = [None] * len(inputs)
    axes[0], axes[-1] = 1, 1
    if kind == "layer":
        axes[1] = 0
    if logits is not None and logits.shape[1] > 1:
        axes[-2] = 1
    got = value_and_gradients(ours, inputs, upstream, needs)
    lows = runs_in_other_orders(plain, inputs, axes, upstream, needs)
    assert_all_low_precision(got, lows, value_and_gradients(plain, doubled(inputs), upstream.double(), needs))
    of_logits = got.get(f"gradient {len(inputs) - 2}")
    if mask is not None:
        assert not got["gradient 0"][~mask].any()
    if of_logits is not None:
        assert not of_logits[logits == -INF].any()
        if mask is not None and extras.logits == "BIJ":
            assert not of_logits[~mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, *(slow(x) for x in LOW_PRECISION[1:])])
@pytest.mark.parametrize("kind", ["layer", "shared"])
@pytest.mark.parametrize(
    ("options", "extras"),
    [
        (Options(2, leaky=True), Extras("IJ", closed=True, mask=True)),
        slow(Options(0), Extras("BIJ", closed=True, mask=True)),
        slow(Options(1), Extras("BIJ", closed=True)),
        slow(Options(1), Extras(mask=True)),
        slow(Options(3), Extras()),
    ],
    ids=str,
)
def test_couplings_of_logits_masks_and_shared_weights(
    options: Options, extras: Extras, kind: str, dtype: torch.dtype
) -> None:
    inputs = extra_inputs(kind, Shape(3, 7, 3, 9, 5), extras, dtype)

    def of(module: Any, inputs: list[Tensor | None], **impl: str) -> Tensor:
        *first, logits, mask = inputs
        keywords = {"iterations": options.iterations, "leaky": options.leaky, **impl}
        return module.couplings(*first, logits=logits, mask=mask, **keywords)

    got = of(capsops, inputs, impl="triton")
    assert_low_precision(got, [of(reference, inputs)], of(reference, doubled(inputs)), factor=2)
    *_, logits, mask = inputs
    if mask is not None:
        assert not got[~mask].any()
    if logits is not None:
        assert not got[(logits == -INF).expand(got.shape)].any()


@pytest.mark.parametrize("kind", [*KINDS[:2], *map(slow, KINDS[2:])])
def test_logits_of_any_strides(kind: str) -> None:
    """Sliced, transposed and expanded logits give the bits of contiguous ones."""
    shape, extras = Shape(3, 5, 3, 4, 4), Extras("BIJ", mask=True)
    *first, logits, mask = extra_inputs(kind, shape, extras, torch.float32)
    function = with_extras(capsops, kind, Options(1, leaky=True), extras, impl="triton")
    for layout in ("sliced", "transposed", "expanded"):
        x = LAYOUTS[layout](logits)
        got, want = (
            value_and_gradients(function, [*first, y, mask], None, [True] * (len(first) + 1) + [False])
            for y in (x, x.contiguous())
        )
        for name, tensor in want.items():
            assert torch.equal(got[name], tensor), (layout, name)


@pytest.mark.parametrize("kind", [KINDS[0], *map(slow, KINDS[1:])])
def test_the_gradient_of_logits_has_the_same_bits_every_time(kind: str) -> None:
    shape, extras = Shape(66, 3, 2, 4, 4), Extras("J", mask=True)
    inputs = extra_inputs(kind, shape, extras, torch.float32)
    function = with_extras(capsops, kind, Options(2), extras, impl="triton")
    needs = [True] * (len(inputs) - 1) + [False]
    first, second = (value_and_gradients(function, inputs, None, needs) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def op_calls() -> dict[str, tuple[Any, ...]]:
    B, I, J, D, K = 2, 3, 2, 4, 2  # noqa: E741
    ops = torch.ops.capsops
    u, weight, bias = (torch.randn(n, requires_grad=True) for n in ((B, I, K), (I, J, D, K), (J, D)))
    u_hat, grad_u_hat = (torch.randn(B, I, J, D, requires_grad=True) for _ in range(2))
    grad, s = (torch.randn(B, J, D, requires_grad=True) for _ in range(2))
    sums = torch.randn(2, B, J, D)
    return {
        "squash": (ops.squash, s, 1),
        "squash_backward": (ops.squash_backward, grad, s, 1),
        "predictions": (ops.predictions, u, weight),
        "predictions_backward": (ops.predictions_backward, grad_u_hat, u, weight, True, True),
        "dynamic_routing": (ops.dynamic_routing, u_hat, bias, None, None, 2, False, False, True),
        "dynamic_routing_backward": (
            ops.dynamic_routing_backward, grad, u_hat, bias, None, None, sums, 2, True, False, True, False,
        ),
        "capsule_routing": (ops.capsule_routing, u, weight, bias, None, None, 2, False, False, True),
        "capsule_routing_backward": (
            ops.capsule_routing_backward, grad, u, weight, None, None, None, sums, 2, False, False, True,
            True, True, False,
        ),
        "couplings": (ops.couplings, u.detach(), weight.detach(), None, None, None, 2, False),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(op_calls()))
def test_opcheck(name: str) -> None:
    op, *args = op_calls()[name]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.default, (*args, "triton"), test_utils=checks)


def test_whole_graph_compiles() -> None:
    """The op is opaque to torch.compile: one graph that computes the same bits."""
    inputs = layer_inputs(SMALL, True, torch.float32)
    compiled = torch.compile(layer(Options(2)), fullgraph=True, backend="aot_eager")
    got, want = (value_and_gradients(function, inputs) for function in (compiled, layer(Options(2))))
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
