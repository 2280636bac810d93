"""Starting logits, masks, shared weights and unsquashed output: cases that several tests share.

A backend that does not support an option skips its tests here; test_routing_options.py asserts that the
kernels support all of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import capsops
from capsops import reference
from capsops.backends import BACKENDS
from capsops.backends.backend import ALL_OPTIONS, LOGITS, MASK, NO_OPTIONS, SHARED, UNSQUASHED
from capsops.ops._register import routing_options
from capsops.ops.capsule_routing import is_shared
from tests.capsops.cases import Options, Shape, layer_inputs, value_and_gradients
from tests.capsops.compare import assert_close

CLOSED = -torch.inf

# Sizes that fill vectors, tiles and threads unevenly.
SHAPES = [
    Shape(*sizes)
    for sizes in (
        (1, 1, 1, 1, 1),
        (1, 33, 11, 17, 3),
        (1, 100, 2, 16, 8),
        (2, 7, 1, 3, 5),
        (3, 33, 40, 5, 4),
        (4, 7, 11, 16, 16),
        (5, 100, 2, 17, 32),
        (15, 1, 2, 1, 1),
        (16, 33, 11, 16, 8),
        (17, 7, 40, 8, 9),
        (17, 100, 1, 4, 8),
        (33, 7, 11, 5, 3),
        (33, 33, 2, 32, 5),
    )
]

# Each axis empty in turn.
EMPTY_SHAPES = [
    Shape(0, 3, 2, 4, 5),
    Shape(2, 0, 2, 4, 5),
    Shape(2, 3, 0, 4, 5),
    Shape(2, 3, 2, 0, 5),
    Shape(2, 3, 2, 4, 0),
]

# The axes of logits; every other axis is broadcast.
LOGITS_AXES = ["", "J", "IJ", "1IJ", "B1J", "BI1", "BIJ"]


class Routing(NamedTuple):
    """The options of a call; the names are those of arguments, but for two."""

    options: Options
    logits: str | None = None  # their axes
    closed: bool = False  # whether logits close some pairs, and all pairs of some input capsules
    mask: bool = False
    shared: bool = False  # the weight, or û for all output capsules
    squash_output: bool = True

    def __str__(self) -> str:
        flags = [name for name in ("closed", "mask", "shared") if getattr(self, name)]
        logits = [] if self.logits is None else [f"logits[{self.logits}]"]
        return "-".join([str(self.options), *logits, *flags, *([] if self.squash_output else ["unsquashed"])])

    def keywords(self) -> dict[str, int | bool]:
        return {**self.options.keywords(), "squash_output": self.squash_output}

    def used(self) -> frozenset[str]:
        """The options as backends name them."""
        flags = {
            UNSQUASHED: not self.squash_output,
            LOGITS: self.logits is not None,
            MASK: self.mask,
            SHARED: self.shared,
        }
        return frozenset(name for name, is_used in flags.items() if is_used)


# The tensors of a call: u or û, the weight, bias, logits and mask; None for those that it does not have.
Inputs = list[Tensor | None]


def skip_unless_supported(
    impl: str, options: frozenset[str] = ALL_OPTIONS, dtype: torch.dtype = torch.float32
) -> None:
    """Skips the test of a backend that does not support these options, or the dtype."""
    if reason := BACKENDS[impl].why_declined("capsule_routing", dtype, options):
        pytest.skip(reason)


def options_of_call(op: Any, args: tuple[Any, ...]) -> frozenset[str]:
    """The options that a call of a raw op uses."""
    names = [argument.name for argument in op.default._schema.arguments]
    call = dict(zip(names, args, strict=False))
    if "iterations" not in call:
        return NO_OPTIONS
    shared = call["u_hat"].dim() == 3 if "u_hat" in call else is_shared(call["u"].shape, call["weight"].shape)
    return routing_options(call.get("squash_output", True), call["logits"], call["mask"], shared)


def logits_like(shape: Shape, axes: str, closed: bool = False, dtype: torch.dtype = torch.float64) -> Tensor:
    """Starting logits with these axes. `closed`: about a third of them is −inf."""
    sizes = [1 if axis == "1" else getattr(shape, axis) for axis in axes]
    logits = torch.randn(sizes, dtype=torch.float64)
    if closed:
        logits = torch.where(torch.rand(sizes) < 0.35, CLOSED, logits)
        if logits.dim() > 1:  # all pairs of the first input capsule
            logits.flatten(0, -2)[0] = CLOSED
    return logits.to(dtype)


def mask_like(shape: Shape) -> Tensor:
    """A mask [B, I] of which about a third is False, and the whole first sample if there are several."""
    mask = torch.rand(shape.B, shape.I) > 0.35
    if shape.B > 1:
        mask[0] = False
    return mask


def layer_tensors(shape: Shape, routing: Routing, dtype: torch.dtype) -> Inputs:
    u, weight, bias = layer_inputs(shape, routing.options.bias, dtype)
    logits = None if routing.logits is None else logits_like(shape, routing.logits, routing.closed, dtype)
    mask = mask_like(shape) if routing.mask else None
    if routing.shared:
        weight = (torch.randn(shape.J, shape.D, shape.K, dtype=torch.float64) / shape.K**0.5).to(dtype)
    return [u, weight, bias, logits, mask]


def predicted_tensors(shape: Shape, routing: Routing, dtype: torch.dtype) -> Inputs:
    """û the same for all output capsules takes J from the logits, else from the bias."""
    needs_bias = routing.shared and (routing.logits is None or not routing.logits.endswith("J"))
    routing = routing._replace(options=routing.options._replace(bias=routing.options.bias or needs_bias))
    _, _, *others = layer_tensors(shape, routing, dtype)
    sizes = (shape.B, shape.I, shape.D) if routing.shared else shape[:4]
    return [torch.randn(sizes, dtype=torch.float64).to(dtype), None, *others]


def tensors(op: str, shape: Shape, routing: Routing, dtype: torch.dtype = torch.float64) -> Inputs:
    """Random tensors of order 1 for a call of capsule_routing or dynamic_routing."""
    return (layer_tensors if op == "capsule_routing" else predicted_tensors)(shape, routing, dtype)


def axes_of_inputs(op: str, routing: Routing) -> list[int | None]:
    """The axis of the input capsules in each of the Inputs."""
    weight = None if routing.shared or op == "dynamic_routing" else 0
    logits = routing.logits.index("I") if routing.logits and "I" in routing.logits else None
    return [1, weight, None, logits, 1 if routing.mask else None]


def _of_tensors(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(
        first: Tensor,
        weight: Tensor | None,
        bias: Tensor | None = None,
        logits: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return function(*(x for x in (first, weight) if x is not None), bias, logits=logits, mask=mask)

    return call


def ours(op: str, impl: str, routing: Routing) -> Callable[..., Tensor]:
    """The public function, of Inputs."""
    return _of_tensors(partial(getattr(capsops, op), impl=impl, **routing.keywords()))


def plain(op: str, routing: Routing) -> Callable[..., Tensor]:
    """The formula, of Inputs."""
    return _of_tensors(partial(getattr(reference, op), **routing.keywords()))


def wide(inputs: Inputs) -> Inputs:
    """The same in float64."""
    return [x.double() if x is not None and x.is_floating_point() else x for x in inputs]


def assert_same_results(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """Compares results of value_and_gradients for Inputs. In ∂logits terms of order 1 may cancel."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert_close(got[name], tensor, name, tolerance, floor=1 if name == "gradient 3" else 1e-3)


def assert_equals_the_formula(op: str, impl: str, shape: Shape, routing: Routing) -> None:
    """Compares value and gradients in float64."""
    skip_unless_supported(impl, routing.used(), torch.float64)
    inputs = tensors(op, shape, routing)
    assert_same_results(
        value_and_gradients(ours(op, impl, routing), inputs),
        value_and_gradients(plain(op, routing), inputs),
    )


def assert_derivatives(function: Callable[..., Tensor], inputs: Inputs) -> None:
    """First and second derivatives of all inputs but a mask, against finite differences."""
    is_leaf = [x is not None and x.is_floating_point() for x in inputs]

    def of_leaves(*leaves: Tensor) -> Tensor:
        remaining = iter(leaves)
        return function(*(next(remaining) if leaf else x for leaf, x in zip(is_leaf, inputs, strict=True)))

    leaves = [x.requires_grad_() for leaf, x in zip(is_leaf, inputs, strict=True) if leaf]
    assert torch.autograd.gradcheck(of_leaves, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(of_leaves, leaves, fast_mode=True)


def float64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)
