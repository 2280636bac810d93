"""Hostile arguments, by hypothesis: whatever a call is given, it is right or it raises what is documented.

A case is a valid call, which must succeed, and the same call with some arguments changed. Nothing else is
allowed to happen, least of all a crash: these calls run in the process of the test.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import capsops
from capsops import dispatch
from capsops.nn import RoutingCapsules

OPS = torch.ops.capsops
IMPLS = [row.impl for row in dispatch.describe() if row.device == "cpu" and row.available]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# What torch says where an argument cannot be handed to an op at all, and where a graph's own guards see that
# an input is not the one it was made for.
OF_TORCH = re.compile(
    "Expected a value of type|Guard failed|Unexpected number of dimensions in input|Expected input at"
)


class Call(NamedTuple):
    """A function and its arguments by name, in order; `shape` is what their axes are made of."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]

    def run(self) -> tuple[Tensor, ...]:
        results = self.function(**self.arguments)
        return (results,) if isinstance(results, Tensor) else tuple(results)


def raw(op: str) -> Callable[..., Any]:
    return lambda **arguments: getattr(OPS, op)(*arguments.values())


def public(name: str) -> Callable[..., Any]:
    return getattr(capsops, name)


@st.composite
def valid_calls(draw: st.DrawFn) -> Call:
    """A public function or a raw op on arguments that fit."""
    B, I, J, D, K = (draw(st.integers(1, 5)) for _ in range(5))  # noqa: E741
    T = draw(st.integers(0, 4))
    dtype, impl = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(IMPLS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def tensor(*sizes: int, wide: bool = False) -> Tensor:
        x = torch.randn(sizes, generator=generator, dtype=torch.float64)
        return x.to(torch.float32 if wide and dtype != torch.float64 else dtype)

    bias = tensor(J, D) if draw(st.booleans()) else None
    leaky, detach = draw(st.booleans()), draw(st.booleans())
    passes = max(T if J > 1 or leaky else 0, 1)
    s, layer = tensor(passes, B, J, D, wide=True), {"u": tensor(B, I, K), "weight": tensor(I, J, D, K) / 2}
    options = {"iterations": T, "leaky": leaky, "detach": detach}
    routing = {"bias": bias, "logits": None, "mask": None, **options, "squash_output": True}
    calls = {
        "squash": (public, {"s": tensor(B, J, D), "dim": draw(st.integers(-3, 2)), "impl": impl}),
        "predictions": (public, {**layer, "impl": impl}),
        "dynamic_routing": (public, {"u_hat": tensor(B, I, J, D), "bias": bias, **options, "impl": impl}),
        "capsule_routing": (public, {**layer, "bias": bias, **options, "impl": impl}),
        "couplings": (public, {**layer, "bias": bias, "iterations": T, "leaky": leaky, "impl": impl}),
        "op squash": (raw, {"s": tensor(B, J, D), "dim": draw(st.integers(0, 2)), "impl": impl}),
        "op squash_backward": (
            raw,
            {"grad": tensor(B, J, D), "s": tensor(B, J, D), "dim": draw(st.integers(0, 2)), "impl": impl},
        ),
        "op predictions": (raw, {**layer, "impl": impl}),
        "op predictions_backward": (
            raw, {"grad": tensor(B, I, J, D), **layer, "needs_u": True, "needs_weight": True, "impl": impl},
        ),
        "op dynamic_routing": (raw, {"u_hat": tensor(B, I, J, D), **routing, "impl": impl}),
        "op dynamic_routing_backward": (
            raw,
            {
                "grad": tensor(B, J, D), "u_hat": tensor(B, I, J, D), "bias": bias, "s": s, **options,
                "squash_output": True, "impl": impl,
            },
        ),
        "op capsule_routing": (raw, {**layer, **routing, "impl": impl}),
        "op capsule_routing_backward": (
            raw,
            {
                "grad": tensor(B, J, D), **layer, "bias": bias, "s": s, **options, "squash_output": True,
                "needs_u": draw(st.booleans()), "needs_weight": draw(st.booleans()), "impl": impl,
            },
        ),
        "op couplings": (
            raw,
            {
                **layer, "bias": bias, "logits": None, "mask": None, "iterations": T, "leaky": leaky,
                "impl": impl,
            },
        ),
    }  # fmt: skip
    name = draw(st.sampled_from(sorted(calls)))
    kind, arguments = calls[name]
    return Call(name, kind(name.removeprefix("op ")), arguments)


def changed_tensor(draw: st.DrawFn, x: Tensor) -> Any:
    """Another shape, dtype, memory layout, device or values; or no tensor at all."""
    of_axes = ["axis", "axis", "rank", "layout", "kind"] if x.dim() else []
    way = draw(st.sampled_from([*of_axes, "dtype", "values", "none"]))
    if way == "axis":
        axis = draw(st.integers(0, x.dim() - 1))
        size = draw(st.integers(0, 7))
        return x.index_select(axis, torch.arange(size) % x.shape[axis]) if x.shape[axis] else x
    if way == "rank":
        return draw(st.sampled_from([x[None], x[..., None], x.flatten(), x.sum(), x[:1, None].squeeze(0)]))
    if way == "dtype":
        others = [*DTYPES, torch.int64, torch.bool, torch.complex64, torch.uint8]
        return x.to(draw(st.sampled_from(others)))
    if way == "layout":
        layouts = [
            x.transpose(0, -1).contiguous().transpose(0, -1),
            x[:1].expand_as(x),
            torch.stack([x, x], -1)[..., 0],
            x.flip(0),
            x.clone().requires_grad_(),
            x.as_strided(x.shape, [0] * x.dim()) if x.numel() else x,
        ]
        return draw(st.sampled_from(layouts))
    if way == "values":
        values = [0.0, torch.nan, torch.inf, -torch.inf, 1e-45, torch.finfo(x.dtype).max]
        return torch.full_like(x, draw(st.sampled_from(values)))
    if way == "kind":
        return draw(st.sampled_from([x.to("meta"), x.to_sparse(), torch.nested.nested_tensor([x])]))
    return draw(st.sampled_from([None, 1, 0.5, "u", [1.0], (x,), np.zeros(3)]))


INTEGERS = [
    -1,
    0,
    1,
    2,
    3,
    7,
    1000,
    1001,
    -(2**31),
    2**31,
    2**62,
    -(2**63),
    2**63,
    2**70,
    np.int64(2),
    np.int8(-1),
]
OTHERS = [None, "3", 3.0, True, False, [3], float("nan"), torch.tensor(3), object()]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Call, Call]:
    """A valid call, and one with up to three arguments changed."""
    call = draw(valid_calls())
    arguments = dict(call.arguments)
    for name in draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=3, unique=True)):
        x = arguments[name]
        if isinstance(x, Tensor):
            arguments[name] = changed_tensor(draw, x)
        elif name in ("bias", "logits", "mask"):
            arguments[name] = draw(st.sampled_from([torch.zeros(3, 4), torch.ones(2, 3) > 0, 1.0, "b", None]))
        elif name == "impl":
            arguments[name] = draw(st.sampled_from([*dispatch.IMPLS, "gpu", "", None, ["cpu"], 3]))
        elif isinstance(x, bool):
            arguments[name] = draw(st.sampled_from([not x, None, "yes", 1, 0, 2.0]))
        else:
            arguments[name] = draw(st.sampled_from([*INTEGERS, *OTHERS]))
    return call, Call(call.name, call.function, arguments)


def check_result(call: Call, results: tuple[Tensor, ...]) -> None:
    """The same call by the reference in float64 gives the same numbers, where they are of order 1."""
    tensors = [x for x in call.arguments.values() if isinstance(x, Tensor)]
    if any(x.is_meta for x in tensors):
        assert all(x.is_meta for x in results)
        return
    wide = {
        name: x.detach().double() if isinstance(x, Tensor) and x.dtype != torch.bool else x
        for name, x in call.arguments.items()
    }
    exact = Call(call.name, call.function, {**wide, "impl": "reference"}).run()
    assert [x.shape for x in results] == [x.shape for x in exact]
    tame = all(x.detach().double().abs().nan_to_num(1e9, 1e9, 1e9).max() < 20 for x in tensors if x.numel())
    if not tame or call.arguments.get("iterations", 0) > 4:
        return
    for got, want in zip(results, exact, strict=True):
        eps = torch.finfo(tensors[0].dtype).eps
        scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        error = (got.detach().double() - want.detach()).abs().max().item() if want.numel() else 0.0
        # Routing makes an error of its inputs larger: a bound that only a wrong formula exceeds.
        assert error <= max(2000 * eps, 1e-10) * scale, (call.name, error, scale)


def outcome(function: Callable[[], Any]) -> Any:
    """What a call returns, or the error that it raises; anything else ends the test."""
    try:
        return function()
    except (TypeError, ValueError, RuntimeError, AssertionError, IndexError, AttributeError) as error:
        return error


def check_case(case: tuple[Call, Call]) -> None:
    valid, hostile = case
    check_result(valid, valid.run())
    results = outcome(hostile.run)
    if isinstance(results, (TypeError, ValueError)):
        bindings = "incompatible function arguments|bytes at address|takes positive ones"
        assert not re.search(bindings, str(results)), results  # the op itself should have refused it
    elif isinstance(results, Exception):
        known = OF_TORCH.search(str(results)) or re.search(r"^impl='\w+' is not available: ", str(results))
        assert known, f"{hostile.name}: {type(results).__name__}: {results}"
    else:
        check_result(hostile, results)


def fuzz(examples: int) -> Callable[[Callable], Callable]:
    health = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=examples, suppress_health_check=health, database=None)


@fuzz(500)
@given(cases())
def test_hostile_arguments(case: tuple[Call, Call]) -> None:
    check_case(case)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@fuzz(45_000)
@given(cases())
def test_many_hostile_arguments(case: tuple[Call, Call]) -> None:
    check_case(case)


# Modules, traced and exported: the graph is made once, and meets inputs of every kind.


@cache
def graphs(way: str, impl: str) -> tuple[RoutingCapsules, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    layer, u = RoutingCapsules(4, 3, 5, 2), torch.randn(2, 4, 5)
    with capsops.use_impl(impl):
        if way == "module":
            return layer, layer
        if way == "traced":
            return layer, torch.jit.trace(layer, u)
        batch = torch.export.Dim("batch", min=1, max=64)
        return layer, torch.export.export(layer, (u,), dynamic_shapes=({0: batch},)).module()


@st.composite
def inputs_of_a_layer(draw: st.DrawFn) -> tuple[str, str, Any]:
    u = torch.randn(draw(st.integers(1, 5)), 4, 5)
    for _ in range(draw(st.integers(1, 2))):
        if type(u) is Tensor and u.device.type == "cpu" and u.is_floating_point() and not u.is_nested:
            u = changed_tensor(draw, u) if u.layout is torch.strided else u
    return draw(st.sampled_from(["module", "traced", "exported"])), draw(st.sampled_from(IMPLS)), u


def check_input(case: tuple[str, str, Any]) -> None:
    way, impl, u = case
    layer, graph = graphs(way, impl)
    fitting = torch.randn(2, 4, 5)
    torch.testing.assert_close(graph(fitting), layer(fitting), atol=1e-5, rtol=1e-5)
    v = outcome(lambda: graph(u))
    if isinstance(v, (TypeError, ValueError)):
        return
    if isinstance(v, Exception):
        # TorchScript turns every error of Python into a RuntimeError that quotes it.
        quoted = way == "traced" and re.search("(Type|Value)Error: ", str(v))
        # The guards of an exported program index the shape of what need not be a tensor of three axes.
        guards = way == "exported" and re.search("^(Index|Attribute)Error|NestedTensorImpl", repr(v))
        assert quoted or guards or OF_TORCH.search(str(v)), f"{way}: {type(v).__name__}: {v}"
        return
    assert isinstance(u, Tensor)
    assert u.shape[1:] == (4, 5)
    assert v.shape == (u.shape[0], 3, 2)
    if not u.is_meta and u.isfinite().all() and (u.abs() < 1e9).all():
        want = capsops.reference.capsule_routing(u.double(), layer.weight.double(), layer.bias.double())
        torch.testing.assert_close(v.double(), want, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@fuzz(150)
@given(inputs_of_a_layer())
def test_hostile_inputs_of_a_layer(case: tuple[str, str, Any]) -> None:
    check_input(case)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@fuzz(5_000)
@given(inputs_of_a_layer())
def test_many_hostile_inputs_of_a_layer(case: tuple[str, str, Any]) -> None:
    check_input(case)
