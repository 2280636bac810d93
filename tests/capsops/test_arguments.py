"""Every op rejects invalid arguments, whether called by name, in a trace or in an exported program.

Each invalid call is a valid one with some arguments changed, and the valid ones are tested as well: no test
can pass because the op always fails.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import capsops
from capsops import reference
from capsops.nn import PrimaryCapsules, RoutingCapsules
from tests.capsops.cases import Shape, layer_inputs
from tests.capsops.compare import assert_close

OPS = torch.ops.capsops
B, I, J, D, K, T = 2, 3, 4, 5, 6, 3  # noqa: E741

# The arguments of a valid call of each op, in the order of its schema.
VALID: dict[str, dict[str, Any]] = {
    "squash": {"s": torch.zeros(B, D), "dim": 1},
    "squash_backward": {"grad": torch.zeros(B, D), "s": torch.zeros(B, D), "dim": 1},
    "predictions": {"u": torch.zeros(B, I, K), "weight": torch.zeros(I, J, D, K)},
    "predictions_backward": {
        "grad": torch.zeros(B, I, J, D), "u": torch.zeros(B, I, K), "weight": torch.zeros(I, J, D, K),
        "needs_u": True, "needs_weight": True,
    },
    "dynamic_routing": {
        "u_hat": torch.zeros(B, I, J, D), "bias": torch.zeros(J, D), "logits": None, "mask": None,
        "iterations": T, "leaky": False, "detach": False, "squash_output": True,
    },
    "dynamic_routing_backward": {
        "grad": torch.zeros(B, J, D), "u_hat": torch.zeros(B, I, J, D), "bias": torch.zeros(J, D),
        "logits": None, "mask": None, "s": torch.zeros(T, B, J, D), "iterations": T, "leaky": False,
        "detach": False, "squash_output": True, "needs_logits": False,
    },
    "capsule_routing": {
        "u": torch.zeros(B, I, K), "weight": torch.zeros(I, J, D, K), "bias": torch.zeros(J, D),
        "logits": None, "mask": None, "iterations": T, "leaky": False, "detach": False, "squash_output": True,
    },
    "capsule_routing_backward": {
        "grad": torch.zeros(B, J, D), "u": torch.zeros(B, I, K), "weight": torch.zeros(I, J, D, K),
        "bias": torch.zeros(J, D), "logits": None, "mask": None, "s": torch.zeros(T, B, J, D),
        "iterations": T, "leaky": False, "detach": False, "squash_output": True, "needs_u": True,
        "needs_weight": True, "needs_logits": False,
    },
    "couplings": {
        "u": torch.zeros(B, I, K), "weight": torch.zeros(I, J, D, K), "bias": torch.zeros(J, D),
        "logits": None, "mask": None, "iterations": T, "leaky": False,
    },
}  # fmt: skip


def call(op: str, impl: str, changes: dict[str, Any], convert: Callable[[Any], Any] = lambda x: x) -> Any:
    """Calls the op with its valid arguments, some of them changed; `convert` is applied to each."""
    return getattr(OPS, op)(*map(convert, {**VALID[op], **changes}.values()), impl)


# Axes that may have any length in a call whose other arguments are not changed: (op, argument, axis).
FREE = {
    ("squash", "s", 0), ("squash", "s", 1),
    ("predictions", "u", 0), ("predictions", "weight", 1), ("predictions", "weight", 2),
    ("dynamic_routing", "u_hat", 0), ("dynamic_routing", "u_hat", 1),
    ("dynamic_routing_backward", "u_hat", 1),
    ("capsule_routing", "u", 0), ("couplings", "u", 0),
}  # fmt: skip

InvalidCall = tuple[str, dict[str, Any], type[Exception], str]


def wrong_tensors(op: str) -> list[InvalidCall]:
    """Calls in which one tensor is missing, of another dtype, layout or rank, or shorter along one axis."""
    rows: list[InvalidCall] = []
    tensors = {name: x for name, x in VALID[op].items() if isinstance(x, Tensor)}
    for name, x in tensors.items():
        if name != "bias":
            rows.append((op, {name: None}, TypeError, f"{name}: got NoneType, takes a torch.Tensor"))
        rows.append((op, {name: x.long()}, ValueError, f"{name}: got dtype torch.int64"))
        rows.append((op, {name: x.to(torch.complex64)}, ValueError, f"{name}: got dtype torch.complex64"))
        rows.append((op, {name: x.to_sparse()}, ValueError, f"{name}: got layout torch.sparse_coo"))
        if len(tensors) > 1:
            first = "grad" if op == "squash_backward" else name  # its s may have any shape
            rows.append((op, {name: x[None]}, ValueError, f"{first}: got shape"))
            rows.append((op, {name: x.double()}, TypeError, ""))
            rows.append((op, {name: x.half()}, TypeError, ""))
        for axis in range(x.dim()):
            if (op, name, axis) not in FREE:
                rows.append((op, {name: x.narrow(axis, 1, x.shape[axis] - 1)}, ValueError, ""))
    return rows


def wrong_values(op: str) -> list[InvalidCall]:
    rows: list[InvalidCall] = []
    if "dim" in VALID[op]:
        for dim in (-1, 2, 2**62, -(2**63)):
            rows.append((op, {"dim": dim}, ValueError, f"dim: got {dim}, takes 0 to 1 for"))
        rows.append((op, {"s": torch.zeros(())}, ValueError, "s: got a scalar, takes"))
    if "iterations" in VALID[op]:
        for count in (-1, -5, 1001, 2**62, -(2**63)):
            rows.append(
                (
                    op,
                    {"iterations": count},
                    ValueError,
                    f"iterations: got {count}, takes 0 (no routing) to 1000",
                )
            )
    if "s" in VALID[op] and "iterations" in VALID[op]:
        for count in (0, T - 1, T + 1):
            rows.append((op, {"iterations": count}, ValueError, f"s: got shape [{T}, {B}, {J}, {D}], takes"))
    return rows


def wrong_routing_options(op: str) -> list[InvalidCall]:
    """Calls with starting logits, a mask or predictions of wrong shapes or dtypes."""
    if "logits" not in VALID[op]:
        return []
    logits, mask = torch.zeros(I, J), torch.ones(B, I) > 0
    sizes = f"takes a shape that broadcasts to [B, I, J] with B = {B}, I = {I}, J = {J}"
    rows: list[InvalidCall] = [
        (op, {"logits": logits.double()}, TypeError, "logits: got dtype torch.float64, takes that of u"),
        (op, {"logits": logits.long()}, ValueError, "logits: got dtype torch.int64, takes float32"),
        (op, {"logits": logits.to_sparse()}, ValueError, "logits: got layout torch.sparse_coo, takes"),
        (op, {"mask": mask.float()}, TypeError, "mask: got dtype torch.float32, takes torch.bool"),
        (op, {"mask": mask.to(torch.uint8)}, TypeError, "mask: got dtype torch.uint8, takes torch.bool"),
        (op, {"mask": mask.to_sparse()}, ValueError, "mask: got layout torch.sparse_coo, takes"),
    ]
    for shape in ((J + 1,), (I,), (0,), (J, I), (0, J), (B, J), (B, I), (I, I, J), (B, J, I), (1, B, I, J)):
        wrong = {"logits": torch.zeros(shape)}
        rows.append((op, wrong, ValueError, f"logits: got shape {list(shape)}, {sizes}"))
    for shape in ((), (I,), (B,), (1, I), (B, 1), (I, B), (B, I - 1), (0, I), (B, I, 1), (1, B, I)):
        wrong = {"mask": torch.ones(shape) > 0}
        rows.append(
            (op, wrong, ValueError, f"mask: got shape {list(shape)}, takes [B, I] with B = {B}, I = {I}")
        )
    if "weight" in VALID[op]:
        rows += [
            (op, {"weight": torch.zeros(shape)}, ValueError, f"{message} {list(got)}, takes {takes}")
            for shape, message, got, takes in (
                ((J, D, K + 1), "weight: got shape", (J, D, K + 1), f"[J, D, K] with K = {K}"),
                ((1, J, D, K - 1), "weight: got shape", (1, J, D, K - 1), f"[1, J, D, K] with K = {K}"),
                ((D, K), "weight: got shape", (D, K), "[I, J, D, K], or [J, D, K] for all input capsules"),
                ((1, 1, J, D, K), "weight: got shape", (1, 1, J, D, K), "[I, J, D, K], or [J, D, K] for all"),
                ((I - 1, J, D, K), "u: got shape", (B, I, K), f"[B, I, K] with I = {I - 1}, K = {K}"),
                ((J - 1, D, K), "bias: got shape", (J, D), f"[J, D] with J = {J - 1}, D = {D}"),
                ((J, D + 1, K), "bias: got shape", (J, D), f"[J, D] with J = {J}, D = {D + 1}"),
            )
        ]
        rows.append((op, {"u": torch.zeros(B, K), "weight": torch.zeros(J, D, K)}, ValueError, "weight: got"))
        rows.append((op, {"weight": torch.zeros(J, D, K).double()}, TypeError, "weight: got dtype"))
    else:
        alike = torch.zeros(B, I, D)
        unknown = (
            f"u_hat: got shape [{B}, {I}, {D}] without `bias` or `logits` […, J], takes [B, I, J, D], or"
        )
        rows += [
            (op, {"u_hat": alike, "bias": None}, ValueError, unknown),
            (op, {"u_hat": alike, "bias": None, "logits": torch.zeros(())}, ValueError, unknown),
            (op, {"u_hat": alike[0]}, ValueError, f"u_hat: got shape [{I}, {D}], takes [B, I, J, D], or"),
            (
                op,
                {"u_hat": alike, "bias": torch.zeros(D)},
                ValueError,
                f"bias: got shape [{D}], takes [J, D]",
            ),
            (op, {"u_hat": alike, "bias": torch.zeros(J, D + 1)}, ValueError, "bias: got shape"),
            (op, {"u_hat": alike, "logits": torch.zeros(J + 1)}, ValueError, "bias: got shape"),
            (op, {"u_hat": alike, "logits": torch.zeros(B, J, J)}, ValueError, "logits: got shape"),
            (op, {"u_hat": alike, "mask": torch.ones(B, J) > 0}, ValueError, "mask: got shape"),
        ]
    return rows


INVALID_CALLS = [
    row for op in VALID for row in (*wrong_tensors(op), *wrong_values(op), *wrong_routing_options(op))
]


@pytest.mark.parametrize("op", VALID)
def test_valid_calls(impl: str, op: str) -> None:
    """They succeed, so an invalid call is rejected for the arguments that it changes."""
    for convert in (lambda x: x, to_meta):
        results = call(op, impl if convert is not to_meta else "reference", {}, convert)
        assert all(isinstance(x, Tensor) for x in ((results,) if isinstance(results, Tensor) else results))


def to_meta(x: Any) -> Any:
    return x.to("meta") if isinstance(x, Tensor) and x.layout is torch.strided else x


@pytest.mark.parametrize("op", VALID)
def test_kernels_reject_invalid_arguments(impl: str, op: str) -> None:
    for _, changes, error, message in (row for row in INVALID_CALLS if row[0] == op):
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            call(op, impl, changes)


@pytest.mark.parametrize("op", VALID)
def test_fakes_reject_invalid_arguments(op: str) -> None:
    for _, changes, error, message in (row for row in INVALID_CALLS if row[0] == op):
        if any(isinstance(x, Tensor) and x.layout is not torch.strided for x in changes.values()):
            continue  # a sparse tensor has no counterpart on the meta device
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            call(op, "reference", changes, to_meta)


@pytest.mark.parametrize("op", [op for op in VALID if op != "squash"])
def test_tensors_on_different_devices_are_rejected(op: str) -> None:
    for name, x in VALID[op].items():
        if isinstance(x, Tensor):
            with pytest.raises(ValueError, match="got device (meta|cpu), takes that of"):
                call(op, "reference", {name: x.to("meta")})
    if "logits" in VALID[op]:
        for name, x in (("logits", torch.zeros(I, J)), ("mask", torch.ones(B, I) > 0)):
            with pytest.raises(ValueError, match=f"^{name}: got device meta, takes that of u"):
                call(op, "reference", {name: x.to("meta")})


def test_nested_tensors_are_rejected() -> None:
    rows = [torch.zeros(2, 3), torch.zeros(3, 3)]
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor(rows, layout=layout)
        for function in (
            lambda x: capsops.squash(x),
            lambda x: capsops.capsule_routing(x, VALID["predictions"]["weight"]),
            capsops.nn.RoutingCapsules(1, 2, 3, 4),
            capsops.nn.RoutingCapsules(1, 2, 3, 4).couplings,
            capsops.nn.RoutingCapsules(5, 2, 3, 4),
            lambda x: capsops.dynamic_routing(VALID["dynamic_routing"]["u_hat"], x),
            lambda x: capsops.dynamic_routing(VALID["dynamic_routing"]["u_hat"], logits=x),
            lambda x: capsops.dynamic_routing(VALID["dynamic_routing"]["u_hat"], mask=x),
        ):
            with pytest.raises(ValueError, match="got a nested tensor, takes a dense one"):
                function(nested)
    maps = torch.nested.nested_tensor([torch.zeros(1, 8, 8), torch.zeros(1, 9, 8)])
    with pytest.raises(ValueError, match="^x: got a nested tensor, takes a dense one"):
        capsops.nn.PrimaryCapsules(1, 2, 3, 3)(maps)
    with pytest.raises(ValueError, match="^u: got a nested tensor, takes a dense one"):
        capsops.nn.ConvRoutingCapsules(1, 2, 3, 4, kernel_size=3)(maps)
    nested = torch.nested.nested_tensor(rows)
    with pytest.raises(ValueError, match="^s: got a nested tensor, takes a dense one"):
        OPS.squash(nested, 1, "reference")
    for op in ("dynamic_routing", "capsule_routing", "couplings"):
        for name in ("logits", "mask"):
            with pytest.raises(ValueError, match=f"^{name}: got a nested tensor, takes a dense one"):
                call(op, "reference", {name: nested})


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_numpy_integers_are_accepted(integer: type) -> None:
    u, weight, _ = layer_inputs(Shape(B, I, J, D, K))
    want = capsops.capsule_routing(u, weight, iterations=2)
    assert torch.equal(capsops.capsule_routing(u, weight, iterations=integer(2)), want)
    assert torch.equal(
        RoutingCapsules(I, J, K, D, iterations=integer(2)).weight.new_zeros(()), torch.zeros(())
    )
    assert torch.equal(capsops.squash(u, integer(1)), capsops.squash(u, 1))


@pytest.mark.parametrize("wrong", [np.float64(3), np.bool_(True), True, 3.0, "3", None, torch.tensor(3)])
def test_types_other_than_integers_are_rejected(wrong: Any) -> None:
    u_hat = VALID["dynamic_routing"]["u_hat"]
    with pytest.raises(TypeError, match=r"^iterations: got \w+, takes an int$"):
        capsops.dynamic_routing(u_hat, iterations=wrong)
    with pytest.raises(TypeError, match=r"^iterations: got \w+, takes an int$"):
        RoutingCapsules(I, J, K, D, iterations=wrong)
    with pytest.raises(TypeError, match=r"^dim: got \w+, takes an int$"):
        capsops.squash(u_hat, wrong)


def test_integers_beyond_64_bits_are_rejected() -> None:
    u_hat = VALID["dynamic_routing"]["u_hat"]
    for huge in (2**63, 2**70, -(2**70)):
        with pytest.raises(ValueError, match=rf"^iterations: got {huge}, takes"):
            capsops.dynamic_routing(u_hat, iterations=huge)
        with pytest.raises(ValueError, match=rf"^dim: got {huge}, takes"):
            capsops.squash(u_hat, huge)


# A traced or exported module, called with an input unlike its example.

OTHER_INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "fewer capsules": lambda u: u[:, :-1],
    "shorter capsules": lambda u: u[..., :-1],
    "another dtype": lambda u: u.double(),
    "another rank": lambda u: u[0],
}


@pytest.fixture(scope="module")
def layer() -> RoutingCapsules:
    return RoutingCapsules(I, J, K, D)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_module_rejects_other_inputs(layer: RoutingCapsules) -> None:
    """TorchScript replaces any Python error by a RuntimeError that quotes its type and message."""
    u = torch.randn(B, I, K)
    traced = torch.jit.trace(layer, u)
    assert_close(traced(u[:1]).detach(), layer(u[:1]).detach(), tolerance=1e-6)
    for change in OTHER_INPUTS.values():
        with pytest.raises(RuntimeError, match="(ValueError: u: got shape|TypeError: weight: got dtype)"):
            traced(change(u))


def test_an_exported_module_rejects_other_inputs(layer: RoutingCapsules) -> None:
    u = torch.randn(B, I, K)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (u,), dynamic_shapes=({0: batch},)).module()
    assert_close(program(u[:1]).detach(), layer(u[:1]).detach(), tolerance=1e-6)
    with pytest.raises(TypeError, match=r"^weight: got dtype torch.float32, takes that of u, which is"):
        program(u.double())
    for name in ("fewer capsules", "shorter capsules"):
        with pytest.raises((AssertionError, RuntimeError, ValueError)):  # torch.export's own guards
            program(OTHER_INPUTS[name](u))


# Modules.

INVALID_LAYERS: list[tuple[type[nn.Module], tuple, dict, type[Exception], str]] = [
    (RoutingCapsules, ("3", 4, 5, 6), {}, TypeError, "in_capsules: got str, takes an int"),
    (RoutingCapsules, (3.0, 4, 5, 6), {}, TypeError, "in_capsules: got float, takes an int"),
    (RoutingCapsules, (3, None, 5, 6), {}, TypeError, "out_capsules: got NoneType, takes an int"),
    (RoutingCapsules, (3, 4, True, 6), {}, TypeError, "in_dim: got bool, takes an int"),
    (RoutingCapsules, (0, 4, 5, 6), {}, ValueError, "in_capsules: got 0, takes 1 or more"),
    (RoutingCapsules, (3, -4, 5, 6), {}, ValueError, "out_capsules: got -4, takes 1 or more"),
    (RoutingCapsules, (3, 4, 0, 6), {}, ValueError, "in_dim: got 0, takes 1 or more"),
    (RoutingCapsules, (3, 4, 5, -1), {}, ValueError, "out_dim: got -1, takes 1 or more"),
    (RoutingCapsules, (3, 4, 5, 6), {"bias": 1}, TypeError, "bias: got int, takes a bool"),
    (RoutingCapsules, (3, 4, 5, 6), {"leaky": "no"}, TypeError, "leaky: got str, takes a bool"),
    (RoutingCapsules, (3, 4, 5, 6), {"iterations": 1001}, ValueError, "iterations: got 1001, takes 0"),
    (PrimaryCapsules, (4, "2", 8, 3), {}, TypeError, "capsules: got str, takes an int"),
    (PrimaryCapsules, (0, 2, 8, 3), {}, ValueError, "in_channels: got 0, takes 1 or more"),
    (PrimaryCapsules, (4, -2, -8, 3), {}, ValueError, "capsules: got -2, takes 1 or more"),
    (PrimaryCapsules, (4, 2, 8.0, 3), {}, TypeError, "dim: got float, takes an int"),
    (PrimaryCapsules, (4, 2, 8, 0), {}, ValueError, "kernel_size: got 0, takes 1 or more"),
    (
        PrimaryCapsules,
        (4, 2, 8, (3, 3, 3)),
        {},
        ValueError,
        "kernel_size: got (3, 3, 3), takes an int, or two",
    ),
    (PrimaryCapsules, (4, 2, 8, 3), {"stride": (1, 0)}, ValueError, "stride: got 0, takes 1 or more"),
    (capsops.nn.Squash, ("last",), {}, TypeError, "dim: got str, takes an int"),
]


@pytest.mark.parametrize(("module", "args", "options", "error", "message"), INVALID_LAYERS)
def test_layers_reject_invalid_arguments(
    module: type[nn.Module], args: tuple, options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        module(*args, **options)


WEIGHT = torch.zeros(J, I, D, K)


@pytest.mark.parametrize(
    ("weight", "layout", "bias", "error", "message"),
    [
        (WEIGHT.int(), "JIDK", None, ValueError, "weight: got dtype torch.int32, takes float32"),
        (WEIGHT.to(torch.complex64), "JIDK", None, ValueError, "weight: got dtype torch.complex64"),
        (WEIGHT.to_sparse(), "JIDK", None, ValueError, "weight: got layout torch.sparse_coo"),
        (WEIGHT, 5, None, TypeError, "layout: got int, takes a str such as 'JIDK'"),
        (WEIGHT, None, None, TypeError, "layout: got NoneType, takes a str"),
        (WEIGHT, ["J", "I", "D", "K"], None, TypeError, "layout: got list, takes a str"),
        (
            WEIGHT[:0],
            "JIDK",
            None,
            ValueError,
            "weight: got shape [0, 3, 5, 6] in layout 'JIDK', takes no axis",
        ),
        (WEIGHT, "JIDK", torch.zeros(J, D).long(), ValueError, "bias: got dtype torch.int64"),
        (WEIGHT, "JIDK", [0.0], TypeError, "bias: got list, takes a torch.Tensor"),
    ],
)
def test_from_weight_rejects_invalid_arguments(
    weight: Tensor, layout: Any, bias: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        RoutingCapsules.from_weight(weight, layout, bias=bias)


def test_an_image_of_another_size_is_an_error_about_u() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), PrimaryCapsules(8, 2, 4, 3), RoutingCapsules(18, 3, 4, 5))
    assert model(torch.zeros(1, 1, 9, 9)).shape == (1, 3, 5)
    with pytest.raises(
        ValueError, match=r"^u: got shape \[1, 32, 4\], takes \[B, I, K\] with I = 18, K = 4$"
    ):
        model(torch.zeros(1, 1, 11, 11))


# One output capsule.


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_couplings_to_one_output_capsule_are_always_1(impl: str, iterations: int) -> None:
    u, weight = torch.randn(2, 3, 4), torch.randn(3, 1, 5, 4)
    u[0, 0, 0], weight[1, 0, 0, 0] = torch.nan, torch.inf
    ones = torch.ones(2, 3, 1)
    assert torch.equal(capsops.couplings(u, weight, iterations=iterations, impl=impl), ones)
    assert torch.equal(OPS.couplings(u, weight, None, None, None, iterations, False, impl), ones)
    assert torch.equal(reference.couplings(u, weight, iterations=iterations), ones)


def test_one_output_capsule_with_an_orphan_class_is_routed(impl: str) -> None:
    u, weight = torch.randn(2, 3, 4), 0.3 * torch.randn(3, 1, 5, 4)
    c = capsops.couplings(u, weight, leaky=True, impl=impl)
    assert ((c > 0) & (c < 1)).all()
    u[0, 0, 0] = torch.nan
    c = capsops.couplings(u, weight, leaky=True, impl=impl)
    assert c[0, 0].isnan().all()
    assert not c[1].isnan().any()
    torch.testing.assert_close(c, reference.couplings(u, weight, leaky=True), equal_nan=True)


def test_one_output_capsule_saves_the_sums_of_one_pass(impl: str) -> None:
    u, weight = torch.randn(2, 3, 4), torch.randn(3, 1, 5, 4)
    v, s = OPS.capsule_routing(u, weight, None, None, None, 3, False, False, True, impl)
    assert s.shape == (1, 2, 1, 5)
    torch.testing.assert_close(v, reference.capsule_routing(u, weight))
    _, s = OPS.capsule_routing(u, weight, None, None, None, 3, True, False, True, impl)
    assert s.shape == (3, 2, 1, 5)


def test_arguments_are_checked_after_a_call_that_was_right() -> None:
    """The checks of a call are remembered, by all that they look at."""
    u, weight, bias = torch.randn(2, 3, 6), torch.randn(3, 4, 5, 6), torch.zeros(4, 5)
    mask = torch.ones(2, 3, dtype=torch.bool)
    capsops.capsule_routing(u, weight, bias, mask=mask)
    wrong = [
        (u, weight.double(), bias, mask),
        (u, weight[..., 1:], bias, mask),
        (u, weight.to_sparse(), bias, mask),
        (u, weight.to("meta"), bias, mask),
        (u, weight, bias[:, 1:], mask),
        (u, weight, bias, mask.float()),
        (u, weight, bias, mask[:1]),
        (u.half(), weight, bias, mask),
    ]
    for *tensors, mask in wrong:
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match=r"^(u|weight|bias|mask): got "):
                capsops.capsule_routing(*tensors, mask=mask)
    with pytest.raises(ValueError, match="^iterations: got 1001"):
        capsops.capsule_routing(u, weight, bias, iterations=1001)
