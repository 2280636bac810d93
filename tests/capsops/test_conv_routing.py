"""capsops.nn.ConvRoutingCapsules against a plain loop over positions."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import capsops
from capsops import reference
from capsops.nn import ConvRoutingCapsules, RoutingCapsules
from tests.capsops.compare import assert_all_close, assert_all_low_precision, assert_close
from tests.tiers import fast_only


@pytest.fixture(autouse=True)
def every_backend(impl: str) -> Iterator[None]:
    """Runs every test of this file with every backend."""
    with capsops.use_impl(impl):
        yield


def by_loop(
    layer: ConvRoutingCapsules, u: Tensor, weight: Tensor, bias: Tensor | None, **options: Any
) -> Tensor:
    """The layer's formula: at each position a layer of its own, of the capsules under the kernel."""
    (kh, kw), (sh, sw), (ph, pw) = layer.kernel_size, layer.stride, layer.padding
    B, C, K, H, W = u.shape
    padded = u.new_zeros(B, C, K, H + 2 * ph, W + 2 * pw)
    padded[..., ph : ph + H, pw : pw + W] = u
    matrices = torch.stack(
        [weight[c, y, x] for c in range(C) for y in range(kh) for x in range(kw)]
    )  # [C·kh·kw, J, D, K]
    rows = []
    for top in range(0, H + 2 * ph - kh + 1, sh):
        row = []
        for left in range(0, W + 2 * pw - kw + 1, sw):
            capsules = [
                padded[:, c, :, top + y, left + x] for c in range(C) for y in range(kh) for x in range(kw)
            ]
            row.append(reference.capsule_routing(torch.stack(capsules, 1), matrices, bias, **options))
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


def options(layer: ConvRoutingCapsules) -> dict[str, Any]:
    return {"iterations": layer.iterations, "leaky": layer.leaky, "detach": layer.detach}


def results(layer: ConvRoutingCapsules, u: Tensor, dtype: torch.dtype, plain: bool) -> dict[str, Tensor]:
    """The value and all gradients, of the layer or of the loop, for the same upstream gradient."""
    layer = copy.deepcopy(layer).to(dtype)
    u = u.detach().to(dtype).requires_grad_()
    v = by_loop(layer, u, layer.weight, layer.bias, **options(layer)) if plain else layer(u)
    grad = torch.randn(v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parameters = dict(layer.named_parameters())
    gradients = torch.autograd.grad(v, (u, *parameters.values()), grad.to(dtype))
    return {"value": v.detach(), **dict(zip(("u", *parameters), gradients, strict=True))}


def with_bias(*arguments: Any, **keywords: Any) -> ConvRoutingCapsules:
    """A layer whose bias is not 0."""
    layer = ConvRoutingCapsules(*arguments, **keywords)
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias, std=0.1)
    return layer


def test_one_capsule_by_hand() -> None:
    """Two capsules of one number, side by side, weights 1 and 10; one output, so that s is their sum."""
    layer = ConvRoutingCapsules(1, 1, 1, 1, (1, 2), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 10.0]).reshape(1, 1, 2, 1, 1, 1))
    u = torch.tensor([1.0, 2, 3]).reshape(1, 1, 1, 1, 3)
    want = capsops.squash(torch.tensor([1 + 20.0, 2 + 30.0]).reshape(1, 1, 1, 1, 2), 2)
    assert_close(layer(u), want, tolerance=1e-6)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [
        (3, 1, 1, (5, 6)),
        (3, 2, 0, (7, 8)),
        (1, 1, 0, (2, 3)),
        ((2, 3), 1, 0, (4, 5)),
        ((3, 1), (2, 3), (1, 0), (6, 7)),
        ((1, 2), (3, 1), (0, 2), (5, 3)),
        (4, 5, 3, (4, 1)),
        (2, 3, 0, (2, 4)),
    ],
)
def test_equals_a_loop_over_positions(kernel: Any, stride: Any, padding: Any, size: tuple[int, int]) -> None:
    layer = with_bias(3, 4, 5, 6, kernel, stride, padding)
    u = torch.randn(2, 3, 5, *size)
    got, want = (results(layer, u, torch.float64, plain) for plain in (False, True))
    assert_all_close(got, want, 1e-10)
    conv = torch.nn.Conv2d(1, 1, kernel, stride, padding)
    assert layer(u).shape == (2, 4, 6, *conv(torch.zeros(1, 1, *size)).shape[2:])


@pytest.mark.parametrize(
    "options",
    [
        {"iterations": 0},
        {"iterations": 1, "bias": False},
        {"iterations": 2, "leaky": True},
        {"detach": True},
        {"iterations": 4, "leaky": True, "detach": True, "bias": False},
    ],
)
def test_options_of_routing(options: dict[str, Any]) -> None:
    layer = with_bias(2, 3, 4, 5, 3, 2, 1, **options)
    u = torch.randn(3, 2, 4, 6, 5)
    got, want = (results(layer, u, torch.float64, plain) for plain in (False, True))
    assert_all_close(got, want, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    layer, u = with_bias(4, 3, 8, 16, 3, 1, 1).to(dtype), torch.randn(4, 4, 8, 5, 5).to(dtype)
    exact, low = results(layer, u, torch.float64, True), results(layer, u, dtype, True)
    assert_all_low_precision(results(layer, u, dtype, False), [low], exact)


@pytest.mark.parametrize("gradient", [False, True])
def test_gradients_are_those_of_finite_differences(gradient: bool) -> None:
    """And with `gradient` the second ones."""
    layer, u = with_bias(2, 2, 2, 3, 2, 1, 1).double(), torch.randn(1, 2, 2, 2, 3, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    inputs = [x.detach().requires_grad_() for x in (u, *parameters)]

    def call(u: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (u,))

    if gradient:
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)
    else:
        assert torch.autograd.gradcheck(call, inputs)


def test_a_kernel_as_large_as_the_map_is_a_routing_layer() -> None:
    layer = with_bias(3, 4, 5, 6, (2, 3))
    full = RoutingCapsules.from_weight(layer.weight.flatten(0, 2), "IJDK", bias=layer.bias)
    u = torch.randn(2, 3, 5, 2, 3)
    capsules = u.permute(0, 1, 3, 4, 2).flatten(1, 3)  # type by type, row by row, as PrimaryCapsules has them
    assert torch.equal(layer(u)[..., 0, 0], full(capsules))
    assert torch.equal(layer.couplings(u)[:, 0, 0], full.couplings(capsules))


def test_capsules_of_the_padding_have_uniform_couplings_and_change_nothing_else() -> None:
    layer, u = with_bias(2, 4, 5, 6, 3, padding=1), torch.randn(2, 2, 5, 3, 3)
    c = layer.couplings(u)
    assert c.shape == (2, 3, 3, 18, 4)
    assert not c.requires_grad
    corner = c[:, 0, 0].unflatten(1, (2, 3, 3))
    assert (corner[:, :, 0] == 0.25).all()
    assert (corner[:, :, :, 0] == 0.25).all()
    inside = corner[:, :, 1:, 1:]
    assert (inside != 0.25).any()
    windows = u[..., :2, :2].permute(0, 1, 3, 4, 2).flatten(1, 3)
    weight = layer.weight[:, 1:, 1:].flatten(0, 2)
    assert_close(
        inside.flatten(1, 3), capsops.couplings(windows, weight, layer.bias, iterations=3), tolerance=1e-6
    )
    assert_close(layer(u)[..., 0, 0], capsops.capsule_routing(windows, weight, layer.bias), tolerance=1e-6)


def layouts(u: Tensor) -> dict[str, Tensor]:
    wide = torch.full((*u.shape[:4], 2 * u.shape[4]), torch.nan, dtype=u.dtype)
    wide[..., ::2] = u
    return {
        "channels_last": u.contiguous(memory_format=torch.channels_last_3d),
        "capsules together": u.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2),
        "sliced": wide[..., ::2],
        "expanded": u[:, :, :, :1].expand(-1, -1, -1, u.shape[3], -1),
    }


@pytest.mark.parametrize("layout", ["channels_last", "capsules together", "sliced", "expanded"])
def test_the_memory_format_of_the_input_has_no_effect(layout: str) -> None:
    layer, u = with_bias(2, 3, 4, 5, 3, 2, 1), torch.randn(3, 2, 4, 6, 5)
    x = layouts(u)[layout].detach().requires_grad_()
    same = x.detach().contiguous().requires_grad_()
    grad = torch.randn_like(layer(same))
    layer(x).backward(grad.contiguous(memory_format=torch.channels_last_3d))
    layer(same).backward(grad.contiguous())
    assert torch.equal(layer(x), layer(same))
    assert_close(x.grad, same.grad, tolerance=1e-6)


def test_layers_follow_one_another() -> None:
    first, second = with_bias(2, 3, 4, 5, 3, padding=1), with_bias(3, 2, 5, 6, 2, 2)
    u = torch.randn(2, 2, 4, 4, 4)
    assert_close(second(first(u)), second(first(u).contiguous()), tolerance=1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", fast_only(["aot_eager"], ["aot_eager", "inductor"]))
def test_compiles_without_a_break(backend: str, dynamic: bool) -> None:
    layer, u = with_bias(2, 3, 4, 5, 3, 2, 1), torch.randn(3, 2, 4, 6, 5)
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=dynamic)
    grad = torch.randn_like(layer(u))
    for call in (compiled, layer):
        x = u.clone().requires_grad_()
        v = call(x)
        gradients = torch.autograd.grad(v, (x, *layer.parameters()), grad)
        if call is compiled:
            got = (v, *gradients)
    for a, b in zip(got, (v, *gradients), strict=True):
        assert_close(a, b, tolerance=1e-6)
    torch.compiler.reset()


def test_exports_and_is_traced() -> None:
    layer, u = with_bias(2, 3, 4, 5, 3, 2, 1), torch.randn(3, 2, 4, 6, 5)
    batch, size = torch.export.Dim("batch", min=1, max=64), torch.export.Dim.AUTO
    exported = torch.export.export(layer, (u,), dynamic_shapes=({0: batch, 3: size, 4: size},)).module()
    traced = torch.fx.symbolic_trace(layer)
    for x in (u, torch.randn(5, 2, 4, 8, 7)):
        assert torch.equal(exported(x), layer(x))
        assert torch.equal(traced(x), layer(x))


def test_an_empty_batch() -> None:
    assert ConvRoutingCapsules(2, 3, 4, 5, 3, padding=1)(torch.randn(0, 2, 4, 6, 5)).shape == (0, 3, 5, 6, 5)


@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_round_trip(bias: bool) -> None:
    layer, other = (ConvRoutingCapsules(2, 3, 4, 5, (3, 2), bias=bias) for _ in range(2))
    shapes = {name: tuple(x.shape) for name, x in layer.state_dict().items()}
    assert shapes == {"weight": (2, 3, 2, 3, 5, 4)} | ({"bias": (3, 5)} if bias else {})
    u = torch.randn(2, 2, 4, 5, 4)
    assert not torch.equal(layer(u), other(u))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(u), other(u))


def test_deepcopy_is_independent() -> None:
    layer = ConvRoutingCapsules(2, 3, 4, 5, 3, (2, 1), 1, iterations=2, leaky=True, detach=True)
    copied = copy.deepcopy(layer)
    assert repr(copied) == repr(layer)
    assert torch.equal(copied.weight, layer.weight)
    with torch.no_grad():
        copied.weight.zero_()
    assert layer.weight.abs().sum() > 0


def test_repr_shows_the_arguments() -> None:
    assert repr(ConvRoutingCapsules(2, 3, 4, 5, 3, (2, 1), padding=1, bias=False, leaky=True)) == (
        "ConvRoutingCapsules(2, 3, in_dim=4, out_dim=5, kernel_size=(3, 3), stride=(2, 1), padding=(1, 1),"
        " iterations=3, bias=False, leaky=True, detach=False)"
    )


@pytest.mark.parametrize("iterations", [0, 3])
@pytest.mark.parametrize("sizes", [(32, 32, 16, 16, 3), (4, 10, 8, 16, (2, 3)), (8, 1, 4, 4, 5)])
def test_sums_of_the_first_pass_have_a_length_near_0_3(sizes: tuple[Any, ...], iterations: int) -> None:
    layer = ConvRoutingCapsules(*sizes, iterations=iterations)
    u = capsops.squash(torch.randn(20, sizes[0], sizes[2], 5, 5), 2)
    layer.iterations = min(iterations, 1)
    v = layer(u).norm(dim=2)
    assert 0.25 < (v / (1 - v)).mean().sqrt() < 0.36


@pytest.mark.parametrize(
    "shape", [(2, 2, 4, 6), (2, 3, 4, 6, 5), (2, 2, 5, 6, 5), (2, 4, 6, 5), (2, 2, 4, 6, 5, 1)]
)
def test_the_error_for_a_wrong_input_names_the_argument(shape: tuple[int, ...]) -> None:
    message = rf"^u: got shape {re.escape(str(list(shape)))}, takes \[B, C, K, H, W\] with C = 2, K = 4$"
    with pytest.raises(ValueError, match=message):
        ConvRoutingCapsules(2, 3, 4, 5, 3)(torch.zeros(shape))


def test_the_error_for_a_map_smaller_than_the_kernel() -> None:
    message = r"^u: got shape \[2, 2, 4, 1, 4\], takes maps of 2 × 4 or more, so that the kernel fits "
    layer = ConvRoutingCapsules(2, 3, 4, 5, 4, padding=(1, 0))
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(2, 2, 4, 1, 4))
    assert layer(torch.zeros(2, 2, 4, 2, 4)).shape == (2, 3, 5, 1, 1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"in_capsules": 0}, ValueError, "in_capsules: got 0, takes 1 or more"),
        ({"out_dim": 2.0}, TypeError, "out_dim: got float, takes an int"),
        ({"kernel_size": 0}, ValueError, "kernel_size: got 0, takes 1 or more"),
        ({"kernel_size": (3, 3, 3)}, ValueError, r"kernel_size: got \(3, 3, 3\), takes an int, or two"),
        ({"kernel_size": "3"}, TypeError, "kernel_size: got str, takes an int"),
        ({"stride": (1, 0)}, ValueError, "stride: got 0, takes 1 or more"),
        ({"padding": -1}, ValueError, "padding: got -1, takes 0 or more"),
        ({"padding": "same"}, TypeError, "padding: got str, takes an int"),
        ({"iterations": 1001}, ValueError, "iterations: got 1001, takes 0"),
        ({"leaky": 1}, TypeError, "leaky: got int, takes a bool"),
        ({"bias": None}, TypeError, "bias: got NoneType, takes a bool"),
    ],
)
def test_arguments_are_checked_when_a_layer_is_made(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"in_capsules": 2, "out_capsules": 3, "in_dim": 4, "out_dim": 5}
    with pytest.raises(error, match=f"^{message}"):
        ConvRoutingCapsules(**{**arguments, "kernel_size": 3, **changes})
