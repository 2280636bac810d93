"""Every op of each set of kernels on a GPU against the reference in float64: shapes × options × precisions.

This is what proves kernels on a GPU model: benchmarks/gpu/first_contact.sh runs it. Without a GPU the kernels
of the CPU are compared, which tries the comparison itself.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import capsops
from capsops import reference
from capsops.backends import BACKENDS
from capsops.backends.backend import LOGITS, MASK, SHARED, UNSQUASHED
from capsops.measuring.comparison import check
from capsops.measuring.passes import FORWARD, FORWARD_BACKWARD, run
from capsops.measuring.precisions import PRECISIONS, matrix_precision
from tests.capsops.cases import Options, Shape
from tests.tiers import slow

TF32_ROUNDING = 2**-10  # of a result's norm: operands rounded to 11 bits, through a few products
SMALL = [Shape(1, 7, 3, 4, 8), Shape(3, 33, 10, 16, 8), Shape(17, 19, 11, 8, 4), Shape(2, 5, 40, 32, 16)]
SHAPES = [
    *SMALL,
    Shape(5, 33, 2, 17, 5),
    Shape(128, 1152, 10, 16, 8),
    Shape(16, 100, 200, 16, 8),
    Shape(64, 128, 10, 32, 32),
    Shape(70, 33, 3, 17, 5),
    Shape(1, 1152, 10, 16, 8),
    Shape(2, 2048, 10, 16, 8),
    Shape(16, 1152, 10, 16, 8),
    Shape(32, 288, 12, 24, 8),
    Shape(33, 50, 10, 16, 7),
    Shape(64, 288, 10, 20, 8),
    Shape(128, 144, 10, 17, 4),
    Shape(37, 257, 10, 16, 16),
    Shape(63, 300, 1, 16, 8),
    Shape(130, 65, 5, 8, 8),
    Shape(4, 3872, 196, 16, 8),
    Shape(64, 2, 10, 16, 8),
    Shape(64, 10, 10, 52, 16),
    Shape(64, 10, 3, 16, 62),
    Shape(64, 2, 3, 100, 5),
    Shape(512, 200, 10, 16, 8),
]
OPTIONS = [
    Options(3, bias=True),
    Options(3),
    Options(2, leaky=True, bias=True),
    Options(3, leaky=True, detach=True),
    Options(1, bias=True),
    Options(1, leaky=True),
    Options(0, bias=True),
    Options(4, detach=True, bias=True),
]
FEW_OPTIONS = [Options(3, bias=True), Options(2, leaky=True, detach=True)]
# What routing starts from: its first arguments by the name that a comparison has.
LAYERS = ["own weights", "a shared weight"]
PREDICTIONS = ["own predictions", "predictions the same for all outputs"]


class Extra(NamedTuple):
    """Arguments of routing beside Options: what logits are of, whether there is a mask, other keywords."""

    logits: str = ""
    mask: bool = False
    keywords: Mapping[str, int | bool] = MappingProxyType({})

    @property
    def needed(self) -> set[str]:
        """The options that a backend has to support, by which proofs name them."""
        chosen = {LOGITS: self.logits, MASK: self.mask, UNSQUASHED: "squash_output" in self.keywords}
        return {name for name, used in chosen.items() if used}


EXTRAS = [
    Extra(keywords={"squash_output": False}),
    Extra(mask=True, keywords={"iterations": 2, "detach": True}),
    Extra("pairs", keywords={"leaky": True}),
    Extra("samples", mask=True, keywords={"squash_output": False}),
    Extra("samples", keywords={"iterations": 1}),
]


class Selection(NamedTuple):
    """The comparisons of a shape."""

    shape: Shape
    options: list[Options]
    extras: Sequence[Extra] = tuple(EXTRAS)
    starts: Sequence[str] = (*LAYERS, *PREDICTIONS)  # with the extras
    unrouted: bool = True  # squash and predictions too


# Each new combination of block, dtype and options compiles kernels, for half a second and more each. So the
# options are compared on one small shape, in which both ways to share a weight have the same kernels, D = K.
# Other shapes are there for other blocks and loops: many samples with K = 8 and without, vectors of several
# blocks, more output capsules than a block has, and numbers that no vector of four divides, whose addresses
# are not multiples of 16.
FOR_TRITON = [
    Selection(Shape(4, 36, 10, 8, 8), [*FEW_OPTIONS, Options(0, bias=True)]),
    Selection(Shape(128, 1152, 10, 16, 8), FEW_OPTIONS[:1], EXTRAS[2:3], LAYERS[:1], unrouted=False),
    Selection(Shape(20, 19, 11, 8, 4), FEW_OPTIONS[:1], EXTRAS[2:3], LAYERS[:1], unrouted=False),
    Selection(Shape(36, 9, 3, 40, 70), FEW_OPTIONS[:1], EXTRAS[2:3], LAYERS),
    Selection(Shape(16, 100, 200, 16, 8), [], EXTRAS[3:4], [LAYERS[1], PREDICTIONS[0]], unrouted=False),
    Selection(Shape(5, 33, 3, 17, 5), FEW_OPTIONS[1:], []),
]
# Its products are those of TF32, so that only loads and stores are new.
FOR_TRITON_IN_FLOAT16 = [FOR_TRITON[0]._replace(extras=EXTRAS[3:4]), FOR_TRITON[-1]]


def for_triton(precision: str) -> list[Selection]:
    return FOR_TRITON_IN_FLOAT16 if precision == "float16" else FOR_TRITON


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@dataclass(frozen=True)
class Comparison:
    """One op with its options, on inputs of one dtype."""

    name: str
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    passes: str
    terms: int  # products in the longest sum
    op: str
    arguments: dict[str, Any]  # of the op, inputs too

    def __call__(self, tf32: bool) -> float:
        """The largest relative error; AssertionError where it is more than the dtype explains."""
        exact_inputs = tuple(x.detach().double().requires_grad_() for x in self.inputs)
        grad = self.upstream()
        exact = run(self.plain, self.passes, exact_inputs, grad.double())
        by_plain = run(self.plain, self.passes, self.inputs, grad)
        results, again = (run(self.ours, self.passes, self.inputs, grad) for _ in range(2))
        for x, y in zip(results, again, strict=True):
            if not torch.equal(x, y):
                raise AssertionError(f"{self.name}: two calls differ by {(x - y).abs().max().item():.2e}")
        terms = self.terms
        if tf32:  # as many float32 roundings as amount to TF32's
            terms = max(terms, int((2 * TF32_ROUNDING / torch.finfo(torch.float32).eps) ** 2))
        return check(self.name, results, by_plain, exact, terms)

    def upstream(self) -> Tensor:
        """A gradient of the value, made on the host."""
        with torch.no_grad():
            value = self.ours(*self.inputs)
        return torch.randn(value.shape).to(value)


def _device(impl: str) -> str:
    return "cpu" if impl == "cpu" else "cuda"


def _numbers(*sizes: int, scale: float, dtype: torch.dtype, device: str) -> Tensor:
    return (torch.randn(*sizes) * scale).to(dtype).to(device).requires_grad_()


def option_comparisons(
    impl: str, dtype: torch.dtype, selection: Selection, device: str = ""
) -> Iterator[Comparison]:
    """The routing ops with the options that the backend supports."""
    B, I, J, D, K = selection.shape  # noqa: E741
    numbers = partial(_numbers, dtype=dtype, device=device or _device(impl))
    u, alike, u_hat = numbers(B, I, K, scale=0.3), numbers(B, I, D, scale=0.1), numbers(B, I, J, D, scale=0.1)
    weight, shared = numbers(I, J, D, K, scale=0.1), numbers(J, D, K, scale=0.1)
    bias, of_pairs, of_samples = numbers(J, D, scale=0.1), numbers(I, J, scale=1), numbers(B, I, J, scale=1)
    with torch.no_grad():
        of_samples.masked_fill_((torch.rand(of_samples.shape) < 0.2).to(of_samples.device), -torch.inf)
    mask = torch.rand(B, I) < 0.8
    mask[:, 0] = True
    mask = mask.to(u.device)
    starts = dict(zip([*LAYERS, *PREDICTIONS], [(u, weight), (u, shared), (u_hat,), (alike,)], strict=True))
    for extra in selection.extras:
        logits = {"": None, "pairs": of_pairs, "samples": of_samples}[extra.logits]
        for op, name in (
            *(("capsule_routing", name) for name in LAYERS),
            *(("couplings", name) for name in LAYERS),
            *(("dynamic_routing", name) for name in PREDICTIONS),
        ):
            first = starts[name]
            used = extra.needed | ({SHARED} if shared is first[-1] or alike is first[-1] else set())
            if name not in selection.starts or not used <= BACKENDS[impl].options:
                continue
            options: dict[str, Any] = dict(extra.keywords)
            if op == "couplings":
                options = {key: x for key, x in options.items() if key in ("iterations", "leaky")}
            inputs = (*first, bias) if logits is None else (*first, bias, logits)

            def call(
                function: Callable, impls: dict, *tensors: Tensor, n: int = len(first), **arguments: object
            ) -> Tensor:
                start = tensors[n + 1] if len(tensors) > n + 1 else None
                return function(*tensors[: n + 1], logits=start, **arguments, **impls)

            arguments = {"mask": mask if extra.mask else None, **options}
            yield Comparison(
                f"{op} {name}, {', '.join(sorted(used))}",
                partial(call, getattr(capsops, op), {"impl": impl}, **arguments),
                partial(call, getattr(reference, op), {}, **arguments),
                inputs,
                FORWARD if op == "couplings" else FORWARD_BACKWARD,
                I * K * J * D + B,
                op,
                {"first": first, "bias": bias, "logits": logits, **arguments},
            )


def comparisons(
    impl: str, dtype: torch.dtype, selection: Selection, device: str = ""
) -> Iterator[Comparison]:
    """Every op on a shape, the routed ones with every set of options. Inputs are made on the host."""
    B, I, J, D, K = selection.shape  # noqa: E741
    numbers = partial(_numbers, dtype=dtype, device=device or _device(impl))
    u, weight, bias = numbers(B, I, K, scale=0.3), numbers(I, J, D, K, scale=0.1), numbers(J, D, scale=0.1)
    u_hat, terms = numbers(B, I, J, D, scale=0.1), I * K * J * D + B

    def compare(
        op: str, inputs: tuple, chosen: dict, name: str, passes: str = FORWARD_BACKWARD
    ) -> Comparison:
        ours, plain = partial(getattr(capsops, op), impl=impl, **chosen), getattr(reference, op)
        first, biases = (inputs[:-1], inputs[-1:]) if inputs[-1] is bias else (inputs, (None,))
        arguments = {"first": first, "bias": biases[0], **chosen}
        return Comparison(
            f"{op} {name}", ours, partial(plain, **chosen), inputs, passes, terms, op, arguments
        )

    if selection.unrouted:
        for dim in (-1, 1):
            yield compare("squash", (u,), {"dim": dim}, f"dim={dim}")
        yield compare("predictions", (u, weight), {}, "")
    for one in selection.options:
        biases, keywords, name = (bias,) if one.bias else (), one.keywords(), str(one)
        yield compare("capsule_routing", (u, weight, *biases), keywords, name)
        yield compare("dynamic_routing", (u_hat, *biases), keywords, name)
        del keywords["detach"]
        yield compare("couplings", (u, weight, *biases), keywords, name, FORWARD)


@pytest.fixture(autouse=True)
def end_with_the_device() -> Iterator[None]:
    """Ends the process once a wild access has made the GPU useless to it; pytest-xdist starts another."""
    yield
    try:
        torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu").cpu()
    except RuntimeError:
        os._exit(70)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def selections(precision: str) -> Iterator[tuple[str, Selection]]:
    """What is compared in a precision, with the name of the kernels."""
    for shape in SHAPES:
        yield "cuda", Selection(shape, OPTIONS)
    for selection in for_triton(precision):
        yield "triton", selection
    yield "cpu", Selection(SMALL[0], FEW_OPTIONS)


@pytest.mark.parametrize(
    ("kernels", "selection", "precision"),
    [
        pytest.param(
            kernels, selection, precision, marks=() if kernels == "cpu" else ON_GPU,
            id=f"{kernels}-{selection.shape}-{precision}",
        )
        for precision in PRECISIONS
        for kernels, selection in selections(precision)
    ],
)  # fmt: skip
@pytest.mark.usefixtures("poisoned_memory")
def test_compared(
    kernels: str,
    selection: Selection,
    precision: str,
    record_property: Callable[[str, object], None],
) -> None:
    torch.manual_seed(0)
    dtype, tf32 = PRECISIONS[precision]
    errors, failures = [], []
    with matrix_precision(tf32):
        for comparison in chain(
            comparisons(kernels, dtype, selection), option_comparisons(kernels, dtype, selection)
        ):
            try:
                errors.append(comparison(tf32))
            except AssertionError as error:
                failures.append(str(error))
    record_property("precision", precision)
    record_property("compared", len(errors) + len(failures))
    if errors:
        record_property("largest error", max(errors))
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("kernels", [pytest.param("cuda", marks=ON_GPU), slow("cpu")])
def test_called(kernels: str, shape: Shape, precision: str) -> None:
    """Under compute-sanitizer: on the device nothing else runs but what autograd needs."""
    torch.manual_seed(0)
    dtype, tf32 = PRECISIONS[precision]
    options = [*FEW_OPTIONS, Options(6), Options(0, bias=True)]
    with matrix_precision(tf32):
        for op in comparisons(kernels, dtype, Selection(shape, options)):
            results = run(op.ours, op.passes, op.inputs, op.upstream())
            assert all(x.cpu().isfinite().all() for x in results), op.name


def test_a_wrong_kernel_fails_the_comparison() -> None:
    ops = list(comparisons("cpu", torch.float32, Selection(SMALL[0], FEW_OPTIONS)))
    assert len(ops) == 3 + 3 * len(FEW_OPTIONS)
    right = next(op for op in ops if "capsule" in op.name)
    assert right(tf32=False) < 1e-5
    wrong = replace(right, ours=lambda *inputs: 1.001 * right.ours(*inputs))
    with pytest.raises(AssertionError, match="value is off"):
        wrong(tf32=False)
    restless = replace(right, ours=lambda *inputs: right.ours(*inputs) + 1e-8 * torch.rand(()))
    with pytest.raises(AssertionError, match="two calls differ"):
        restless(tf32=False)
