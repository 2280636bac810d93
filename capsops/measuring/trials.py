"""The comparisons that prove kernels: every op, dtype and option against the reference in float64."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

import capsops
from capsops import reference
from capsops.backends.backend import LOGITS, MASK, SHARED, UNSQUASHED, Backend
from capsops.measuring.comparison import check
from capsops.measuring.passes import FORWARD, FORWARD_BACKWARD, run
from capsops.measuring.precisions import PRECISIONS, matrix_precision
from capsops.proofs.scope import PLAIN, Call

TF32_ROUNDING = 2**-10  # of a result's norm: operands rounded to 11 bits, through a few products
OF_PAIRS, OF_SAMPLES = "[I, J]", "[B, I, J], some of −inf"


class ReferenceFailedError(Exception):
    """Plain PyTorch could not compute what kernels are compared with."""


class Shape(NamedTuple):
    B: int
    I: int  # noqa: E741
    J: int
    D: int
    K: int

    def __str__(self) -> str:
        return "B{}-I{}-J{}-D{}-K{}".format(*self)

    @property
    def large(self) -> bool:
        return self.B * self.I * self.J * self.D > _LARGE


@dataclass(frozen=True)
class Trial:
    """One op, with its options, on one shape in one precision: value and gradients."""

    op: str
    shape: Shape
    precision: str  # of PRECISIONS
    iterations: int = 3
    leaky: bool = False
    detach: bool = False
    bias: bool = False
    squash_output: bool = True
    logits: str = ""  # OF_PAIRS or OF_SAMPLES
    mask: bool = False
    shared: bool = False
    dim: int = -1  # of squash

    def __str__(self) -> str:
        if self.op == "squash":
            return f"squash along {self.dim} in {self.precision}, {self.shape}"
        if self.op == "predictions":
            return f"predictions in {self.precision}, {self.shape}"
        flags = [name for name in ("leaky", "detach", "bias", "mask", "shared") if getattr(self, name)]
        flags += [f"logits {self.logits}"] if self.logits else []
        flags += [] if self.squash_output else [UNSQUASHED]
        return f"{' '.join([self.op, f'T={self.iterations}', *flags])} in {self.precision}, {self.shape}"

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision][0]

    @property
    def options(self) -> frozenset[str]:
        """Options that a backend may lack."""
        used = {UNSQUASHED: not self.squash_output, LOGITS: self.logits, MASK: self.mask, SHARED: self.shared}
        return frozenset(option for option, is_used in used.items() if is_used)

    @property
    def calls(self) -> list[Call]:
        """What it is part of the proof of."""
        dtype = str(self.dtype).removeprefix("torch.")
        return [(self.op, dtype, option) for option in sorted(self.options) or (PLAIN,)]

    def arguments(self, device: str) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Tensors that need a gradient, and keywords. Made on the host, the same at every call."""
        rng = torch.Generator().manual_seed(0)
        B, I, J, D, K = self.shape  # noqa: E741

        def numbers(*sizes: int, scale: float = 0.1) -> Tensor:
            return (torch.randn(*sizes, generator=rng) * scale).to(self.dtype).to(device)

        if self.op == "squash":
            return (numbers(B, I, K, scale=0.3),), {"dim": self.dim}
        u, weight = numbers(B, I, K, scale=0.3), numbers(*(() if self.shared else (I,)), J, D, K)
        if self.op == "predictions":
            return (u, weight), {}
        u_hat = numbers(B, I, *(() if self.shared else (J,)), D)
        inputs = [u_hat] if self.op == "dynamic_routing" else [u, weight]
        bias, logits, mask = numbers(J, D), None, None
        if self.logits:
            logits = numbers(*(() if self.logits == OF_PAIRS else (B,)), I, J, scale=1)
            if self.logits == OF_SAMPLES:
                closed = torch.rand(logits.shape, generator=rng) < 0.2
                logits = logits.masked_fill(closed.to(device), -torch.inf)
        if self.mask:
            mask = torch.rand(B, I, generator=rng) < 0.8
            mask[:, 0] = True
            mask = mask.to(device)
        alike = self.shared and self.op == "dynamic_routing" and logits is None
        names = ["bias"] if self.bias or alike else []  # J is that of the logits or the bias
        inputs += [bias] * len(names)
        if logits is not None:
            inputs.append(logits)
        keywords: dict[str, Any] = {"iterations": self.iterations, "leaky": self.leaky, "mask": mask}
        if self.op != "couplings":
            keywords |= {"detach": self.detach, "squash_output": self.squash_output}
        return tuple(inputs), {**keywords, "names": (*names, *(["logits"] if logits is not None else []))}

    def call(self, impl: str, device: str) -> tuple[Tensor, ...]:
        """The value and its gradients, and nothing else on the device but what autograd needs."""
        with matrix_precision(PRECISIONS[self.precision][1]):
            ours, _, leaves, passes = self._bound(impl, device)
            with torch.no_grad():
                value = ours(*leaves)
            return run(ours, passes, leaves, torch.ones_like(value))

    def _bound(
        self, impl: str, device: str
    ) -> tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...], str]:
        """The op and its reference as functions of tensors that need gradients, these, and the passes."""
        inputs, keywords = self.arguments(device)
        names = keywords.pop("names", ())
        count = len(inputs) - len(names)

        def call(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
            named = dict(zip(names, tensors[count:], strict=True))
            return function(*tensors[:count], **named, **keywords)

        ours = partial(call, partial(getattr(capsops, self.op), impl=impl))
        plain = partial(call, getattr(reference, self.op))
        passes = FORWARD if self.op == "couplings" else FORWARD_BACKWARD
        return ours, plain, tuple(x.detach().requires_grad_() for x in inputs), passes

    def compare(self, impl: str, device: str) -> float:
        """The largest relative error of the value and its gradients.

        Raises:
            AssertionError: it is more than the dtype explains, or two calls differ by a bit.
            ReferenceFailedError: there is nothing to compare with.
        """
        with matrix_precision(PRECISIONS[self.precision][1]):
            ours, plain, leaves, passes = self._bound(impl, device)
            try:
                with torch.no_grad():
                    value = plain(*leaves)
                grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value)
                by_plain = run(plain, passes, leaves, grad)
                exact_inputs = tuple(x.detach().double().requires_grad_() for x in leaves)
                exact = run(plain, passes, exact_inputs, grad.double())
            except Exception as error:
                raise ReferenceFailedError(f"the reference failed: {error}") from error
            results, again = (run(ours, passes, leaves, grad) for _ in range(2))
            for x, y in zip(results, again, strict=True):
                if not torch.equal(x, y) and not (x.isnan() | y.isnan()).any():
                    difference = (x - y).abs().max().item()
                    raise AssertionError(f"{self}: two calls differ by {difference:.2e}")
            return check(str(self), results, by_plain, exact, self._terms())

    def _terms(self) -> int:
        """Products in the longest sum; in TF32, as many as have float32 roundings that amount to its own."""
        B, I, J, D, K = self.shape  # noqa: E741
        terms = I * K * J * D + B
        if not PRECISIONS[self.precision][1]:
            return terms
        return max(terms, int((2 * TF32_ROUNDING / torch.finfo(torch.float32).eps) ** 2))


_ROUTED = ("capsule_routing", "dynamic_routing", "couplings")
_LARGE = 1 << 20  # numbers of û, above which fewer settings are compared

Setting = dict[str, Any]  # arguments of a Trial

QUICK: list[Setting] = [{"bias": True}, {"iterations": 2, "leaky": True, "detach": True}]
THOROUGH: list[Setting] = [
    *QUICK,
    {},
    {"iterations": 2, "leaky": True, "bias": True},
    {"leaky": True, "detach": True},
    {"iterations": 1, "bias": True},
    {"iterations": 1, "leaky": True},
    {"iterations": 0, "bias": True},
    {"iterations": 4, "detach": True, "bias": True},
]
PLAIN_SHARED: Setting = {"shared": True, "bias": True}
UNSQUASHED_ONLY: Setting = {"squash_output": False, "bias": True}
MASKED: Setting = {"mask": True, "iterations": 2, "detach": True, "bias": True}
LOGITS_OF_PAIRS: Setting = {"logits": OF_PAIRS, "leaky": True, "bias": True}
LOGITS_OF_SAMPLES: Setting = {"logits": OF_SAMPLES, "iterations": 1, "bias": True}
ALL_AT_ONCE: Setting = {"logits": OF_SAMPLES, "mask": True, "squash_output": False, "bias": True}
OPTIONS = [UNSQUASHED_ONLY, MASKED, LOGITS_OF_PAIRS, LOGITS_OF_SAMPLES, ALL_AT_ONCE]


class Selection(NamedTuple):
    """What is compared on one shape: routing by settings, and by options with own and shared weights."""

    shape: Shape
    settings: list[Setting]
    options: list[Setting]
    own: tuple[str, ...] = _ROUTED  # ops with options, and a weight or a prediction for each pair
    shared: tuple[str, ...] = _ROUTED  # ops with options, and shared ones
    unrouted: bool = True  # squash and predictions too

    def trials(self, precision: str) -> Iterator[Trial]:
        if self.unrouted:
            yield from (Trial("squash", self.shape, precision, dim=dim) for dim in (-1, 1))
            yield Trial("predictions", self.shape, precision)
        for op, setting in product(_ROUTED, self.settings):
            yield _routed(op, self.shape, precision, setting)
        for ops, shared in ((self.own, {}), (self.shared, {"shared": True})):
            for op, setting in product(ops, self.options):
                if op != "couplings" or setting is not UNSQUASHED_ONLY:  # which they do not have
                    yield _routed(op, self.shape, precision, {**setting, **shared})


def _routed(op: str, shape: Shape, precision: str, setting: Setting) -> Trial:
    if op == "couplings":
        setting = {**setting, "detach": False, "squash_output": True}
    return Trial(op, shape, precision, **setting)


# Few samples and many; sizes that fill tiles unevenly; lengths that no block divides; long capsules.
QUICK_SHAPES = [
    Shape(3, 33, 10, 16, 8),
    Shape(37, 21, 10, 16, 8),
    Shape(35, 19, 3, 17, 5),
    Shape(1, 7, 3, 4, 8),
    Shape(2, 5, 40, 32, 16),
    Shape(17, 9, 2, 40, 70),
]
THOROUGH_SHAPES = [
    *QUICK_SHAPES,
    Shape(17, 19, 11, 8, 4),
    Shape(5, 33, 2, 17, 5),
    Shape(64, 128, 10, 32, 32),
    Shape(70, 33, 3, 17, 5),
    Shape(1, 1152, 10, 16, 8),
    Shape(2, 2048, 10, 16, 8),
    Shape(16, 1152, 10, 16, 8),
    Shape(16, 100, 200, 16, 8),
    Shape(32, 288, 12, 24, 8),
    Shape(33, 50, 10, 16, 7),
    Shape(64, 288, 10, 20, 8),
    Shape(128, 144, 10, 17, 4),
    Shape(37, 257, 10, 16, 16),
    Shape(63, 300, 1, 16, 8),
    Shape(130, 65, 5, 8, 8),
    Shape(64, 2, 10, 16, 8),
    Shape(64, 10, 10, 52, 16),
    Shape(64, 10, 3, 16, 62),
    Shape(64, 2, 3, 100, 5),
    Shape(128, 1152, 10, 16, 8),
    Shape(512, 200, 10, 16, 8),
    Shape(4, 968, 196, 16, 8),
]

# Where each new combination of block, dtype and options compiles kernels, for half a second and more each,
# options are compared on one small shape, in which both ways to share a weight have the same kernels, D = K.
# Other shapes are there for other blocks and loops: many samples with K = 8 and without, vectors of several
# blocks, more output capsules than a block has, and numbers that no vector of four divides, whose addresses
# are not multiples of 16.
_SMALL, _MANY = Shape(4, 36, 10, 8, 8), Shape(20, 19, 11, 8, 4)
_LONG, _ODD = Shape(36, 9, 3, 40, 70), Shape(5, 33, 3, 17, 5)
_LAYER = ("capsule_routing", "couplings")
THOROUGH_COMPILED = [
    Selection(_SMALL, [*QUICK, {"iterations": 0, "bias": True}], OPTIONS),
    Selection(Shape(128, 1152, 10, 16, 8), QUICK[:1], [LOGITS_OF_PAIRS], _LAYER, (), unrouted=False),
    Selection(_MANY, QUICK[:1], [LOGITS_OF_PAIRS], _LAYER, (), unrouted=False),
    Selection(_LONG, QUICK[:1], [LOGITS_OF_PAIRS], _LAYER, _LAYER),
    Selection(Shape(16, 100, 200, 16, 8), [], [ALL_AT_ONCE], ("dynamic_routing",), _LAYER, unrouted=False),
    Selection(_ODD, QUICK[1:], []),
]
QUICK_COMPILED = [
    Selection(_SMALL, QUICK, [ALL_AT_ONCE]),
    Selection(_MANY, QUICK[:1], [], unrouted=False),
    Selection(_ODD, QUICK[1:], []),
]


def selections(precision: str, compiles: bool, thorough: bool) -> list[Selection]:
    """What is compared in a precision."""
    if compiles:
        chosen = THOROUGH_COMPILED if thorough else QUICK_COMPILED
        if precision != "float16":
            return chosen
        # Its products are those of TF32, so that only loads and stores are new.
        return [chosen[0]._replace(options=[ALL_AT_ONCE]), chosen[-1]]
    if not thorough:
        some, none = [PLAIN_SHARED, *OPTIONS], list[Setting]()
        return [Selection(x, QUICK, some if x in QUICK_SHAPES[:3] else none) for x in QUICK_SHAPES]
    return [
        Selection(x, QUICK[:1] if x.large else THOROUGH, [] if x.large else [PLAIN_SHARED, *OPTIONS])
        for x in THOROUGH_SHAPES
    ]


def trials(backend: Backend, thorough: bool) -> list[Trial]:
    """Those that prove a backend, as far as it supports them; what is called most comes first."""
    on_cpu = backend.devices == ("cpu",)
    chosen = [
        trial
        for precision in PRECISIONS
        if not (on_cpu and PRECISIONS[precision][1])  # which has no TF32
        for selection in selections(precision, backend.compiles, thorough)
        for trial in selection.trials(precision)
    ]
    order = ("capsule_routing", "dynamic_routing", "squash", "predictions", "couplings")
    chosen.sort(key=lambda trial: (bool(trial.options), order.index(trial.op)))
    supported = (x for x in chosen if not backend.why_declined(x.op, x.dtype, x.options))
    return list(dict.fromkeys(supported))
