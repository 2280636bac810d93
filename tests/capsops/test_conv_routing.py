"""capsops.nn.ConvRoutingCapsules against a plain loop over positions."""

import copy
import re
from collections.abc import Callable, Iterator
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
    layer: ConvRoutingCapsules,
    u: Tensor,
    *parameters: Tensor | None,
    logits: Tensor | None = None,
    mask: Tensor | None = None,
    function: Callable[..., Tensor] = reference.capsule_routing,
    **options: Any,
) -> Tensor:
    """The layer's formula [B, H′, W′, …]: a call at each position, of the capsules under the kernel.

    `parameters` are the weight and the bias.
    """
    weight, bias = parameters
    (kh, kw), (sh, sw), (ph, pw) = layer.kernel_size, layer.stride, layer.padding
    B, C, K, H, W = u.shape
    padded = u.new_zeros(B, C, K, H + 2 * ph, W + 2 * pw)
    present = torch.ones(B, C, H + 2 * ph, W + 2 * pw, dtype=torch.bool)
    inside = (..., slice(ph, ph + H), slice(pw, pw + W))
    padded[inside] = u
    if mask is not None:
        present[inside] = mask
    offsets = [(c, y, x) for c in range(C) for y in range(kh) for x in range(kw)]
    matrices = torch.stack([weight[offset] for offset in offsets])  # [C·kh·kw, J, D, K]
    tops, lefts = range(0, H + 2 * ph - kh + 1, sh), range(0, W + 2 * pw - kw + 1, sw)
    if logits is not None:
        logits = logits.expand(B, len(tops), len(lefts), *matrices.shape[:2])
    rows = []
    for row, top in enumerate(tops):
        columns = []
        for column, left in enumerate(lefts):
            capsules = torch.stack([padded[:, c, :, top + y, left + x] for c, y, x in offsets], 1)
            of_position = {
                "logits": None if logits is None else logits[:, row, column],
                "mask": torch.stack([present[:, c, top + y, left + x] for c, y, x in offsets], 1),
            }
            columns.append(function(capsules, matrices, bias, **of_position, **options))
        rows.append(torch.stack(columns, 1))
    return torch.stack(rows, 1)


def options(layer: ConvRoutingCapsules) -> dict[str, Any]:
    return {"iterations": layer.iterations, "leaky": layer.leaky, "detach": layer.detach}


def results(
    layer: ConvRoutingCapsules,
    u: Tensor,
    dtype: torch.dtype,
    plain: bool,
    logits: Tensor | None = None,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """The value and all gradients, of the layer or of the loop, for the same upstream gradient."""
    layer = copy.deepcopy(layer).to(dtype)
    u = u.detach().to(dtype).requires_grad_()
    inputs = {"u": u, **dict(layer.named_parameters())}
    if logits is not None:
        inputs["logits"] = logits = logits.detach().to(dtype).requires_grad_()
    if plain:
        v = by_loop(layer, u, layer.weight, layer.bias, logits=logits, mask=mask, **options(layer))
        v = v.permute(0, 3, 4, 1, 2)
    else:
        v = layer(u, logits=logits, mask=mask)
    grad = torch.randn(v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(v, list(inputs.values()), grad.to(dtype), materialize_grads=True)
    return {"value": v.detach(), **dict(zip(inputs, gradients, strict=True))}


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


# u [B, C, K, H, W] of logits_of() and mask_of(); with SLIDE the map has 3 × 3 positions.
MAPS = (2, 2, 4, 5, 6)
SLIDE = {"kernel_size": (3, 2), "stride": 2, "padding": (1, 0)}
SIZES = {"B": 2, "H": 3, "W": 3, "I": 2 * 3 * 2, "J": 3, "1": 1}
AXES = ["", "J", "IJ", "I1", "WIJ", "H1I1", "111IJ", "B11IJ", "1HWIJ", "BHWIJ"]


def logits_of(axes: str, closed: bool = False, dtype: torch.dtype = torch.float64) -> Tensor:
    """Starting logits with these axes. `closed`: about a third of them is −inf."""
    logits = torch.randn([SIZES[axis] for axis in axes], dtype=dtype)
    if closed:
        logits = torch.where(torch.rand(logits.shape) < 0.35, -torch.inf, logits)
        if logits.dim() > 1:  # all pairs of one input capsule
            logits.flatten(0, -2)[0] = -torch.inf
    return logits


def mask_of() -> Tensor:
    """A mask [B, C, H, W] of which about a third is False, and all that the first kernel covers."""
    mask = torch.rand(MAPS[:2] + MAPS[3:]) > 0.35
    mask[0, :, :2, :2] = False
    return mask


def without_absent(u: Tensor, mask: Tensor, value: float = torch.nan) -> Tensor:
    """u with a value that must have no effect where a capsule is absent."""
    return torch.where(mask[:, :, None], u, value)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("axes", AXES)
def test_starting_logits_and_masks_equal_a_loop(axes: str, closed: bool, masked: bool) -> None:
    """With NaN in absent capsules; the gradients of the logits have the shape of the logits."""
    layer = with_bias(2, 3, 4, 5, **SLIDE, leaky=closed)
    u, logits, mask = torch.randn(MAPS, dtype=torch.float64), logits_of(axes, closed), None
    if masked:
        mask = mask_of()
        u = without_absent(u, mask)
    got, want = (results(layer, u, torch.float64, plain, logits, mask) for plain in (False, True))
    assert got["value"].shape == (2, 3, 5, 3, 3)
    assert_all_close(got, want, 1e-10)


@pytest.mark.parametrize(
    "options", [{"iterations": 0}, {"iterations": 1, "leaky": True}, {"detach": True}, {"bias": False}]
)
def test_starting_logits_and_masks_with_options(options: dict[str, Any]) -> None:
    layer, mask = with_bias(2, 3, 4, 5, **SLIDE, **options), mask_of()
    u, logits = without_absent(torch.randn(MAPS), mask), logits_of("BHWIJ", closed=True)
    got, want = (results(layer, u, torch.float64, plain, logits, mask) for plain in (False, True))
    assert_all_close(got, want, 1e-10)


@pytest.mark.parametrize("axes", [None, "IJ", "BHWIJ"])
def test_couplings_with_logits_and_a_mask(axes: str | None) -> None:
    """Those of absent capsules and of closed pairs are 0, those of the padding are not."""
    layer, mask = with_bias(2, 3, 4, 5, **SLIDE).double(), mask_of()
    u = without_absent(torch.randn(MAPS, dtype=torch.float64), mask)
    logits = None if axes is None else logits_of(axes, closed=True)
    got = layer.couplings(u, logits=logits, mask=mask)
    want = by_loop(
        layer,
        u,
        layer.weight,
        layer.bias,
        logits=logits,
        mask=mask,
        function=reference.couplings,
        iterations=3,
    )
    assert_close(got, want, tolerance=1e-10)
    above = got[:, 0].unflatten(2, (2, 3, 2))[:, :, :, 0]  # the row of padding above the map
    assert axes is not None or (above == 1 / 3).all()
    assert above.sum() > 0
    assert got[0, 0, 0].unflatten(0, (2, 3, 2))[:, 1:].sum() == 0  # absent


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_the_values_of_absent_capsules_have_no_effect(bad: float) -> None:
    layer, u, mask = with_bias(2, 3, 4, 5, **SLIDE), torch.randn(MAPS), mask_of()
    logits = logits_of("BHWIJ", closed=True)
    want = results(layer, u, torch.float32, False, logits, mask)
    got = results(layer, without_absent(u, mask, bad), torch.float32, False, logits, mask)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    assert (got["u"].movedim(2, -1)[~mask] == 0).all()


def test_a_mask_of_true_changes_nothing() -> None:
    layer, u = with_bias(2, 3, 4, 5, **SLIDE), torch.randn(MAPS)
    mask = torch.ones(MAPS[:2] + MAPS[3:], dtype=torch.bool)
    want = results(layer, u, torch.float32, False)
    for name, tensor in results(layer, u, torch.float32, False, mask=mask).items():
        assert torch.equal(tensor, want[name]), name
    assert torch.equal(layer.couplings(u, mask=mask), layer.couplings(u))


@pytest.mark.parametrize("axes", AXES)
def test_logits_of_all_positions_are_not_repeated(axes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, u, logits = ConvRoutingCapsules(2, 3, 4, 5, **SLIDE), torch.randn(MAPS), logits_of(axes).float()
    calls = []

    def record(*tensors: Tensor, logits: Tensor, **options: Any) -> Tensor:
        calls.append(logits)
        return capsops.capsule_routing(*tensors, logits=logits, **options)

    monkeypatch.setattr("capsops.functional.capsule_routing", record)
    layer(u, logits=logits)
    if len(axes) <= 2:
        assert calls[0] is logits
    elif axes == "111IJ":
        assert calls[0].shape == (1, 12, 3)
        assert calls[0].data_ptr() == logits.data_ptr()
    else:
        assert calls[0].shape == (18, *logits.shape[-2:])


def test_logits_and_masks_of_another_memory_layout() -> None:
    layer, u = with_bias(2, 3, 4, 5, **SLIDE), torch.randn(MAPS)
    logits, mask = logits_of("BHWIJ").float(), mask_of()
    want = results(layer, u, torch.float32, False, logits, mask)
    strided = logits.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    masks = mask.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), mask.repeat_interleave(2, 3)[..., ::2]
    for other in masks:
        for name, tensor in results(layer, u, torch.float32, False, strided, other).items():
            assert torch.equal(tensor, want[name]), name


def test_autocast_takes_logits_of_float32() -> None:
    layer, u, mask = with_bias(2, 3, 4, 5, **SLIDE), torch.randn(MAPS), mask_of()
    logits = logits_of("IJ").float()
    with torch.autocast("cpu", torch.bfloat16):
        v = layer(u.bfloat16(), logits=logits, mask=mask)
    assert v.dtype == torch.bfloat16
    assert_close(v.float(), layer(u, logits=logits, mask=mask), tolerance=0.05)


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


@pytest.mark.parametrize("axes", [None, "IJ", "BHWIJ"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", fast_only(["aot_eager"], ["aot_eager", "inductor"]))
def test_compiles_without_a_break(backend: str, dynamic: bool, axes: str | None) -> None:
    """Without options, and with logits and a mask."""
    layer, u = with_bias(2, 3, 4, 5, **SLIDE), torch.randn(MAPS)
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=dynamic)
    grad = torch.randn_like(layer(u))
    start = [] if axes is None else [logits_of(axes).float()]
    mask = None if axes is None else mask_of()
    both = []
    for call in (compiled, layer):
        leaves = [x.clone().requires_grad_() for x in (u, *start)]
        v = call(leaves[0], logits=leaves[1] if start else None, mask=mask)
        both.append((v, *torch.autograd.grad(v, (*leaves, *layer.parameters()), grad)))
    for a, b in zip(*both, strict=True):
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


@pytest.mark.parametrize("axes", ["J", "IJ", "WIJ", "B11IJ", "BHWIJ"])
def test_exports_and_is_traced_with_logits_and_a_mask(axes: str) -> None:
    layer, other = with_bias(2, 3, 4, 5, **SLIDE), {**SIZES, "B": 5, "H": 4, "W": 4}
    batch, size = torch.export.Dim("batch", min=1, max=64), torch.export.Dim.AUTO
    exported = torch.export.export(
        layer,
        (torch.randn(MAPS),),
        {"logits": logits_of(axes).float(), "mask": mask_of()},
        dynamic_shapes={
            "u": {0: batch, 3: size, 4: size},
            "logits": {n: batch if axis == "B" else size for n, axis in enumerate(axes) if axis in "BHW"},
            "mask": {0: batch, 2: size, 3: size},
        },
    ).module()
    traced = torch.fx.symbolic_trace(layer)
    for (height, width), sizes in (((5, 6), SIZES), ((8, 9), other)):
        u = torch.randn(sizes["B"], 2, 4, height, width)
        keywords = {
            "logits": torch.randn([sizes[axis] for axis in axes]),
            "mask": torch.rand(sizes["B"], 2, height, width) > 0.35,
        }
        assert torch.equal(exported(u, **keywords), layer(u, **keywords))
        assert torch.equal(traced(u, **keywords), layer(u, **keywords))
        assert torch.equal(traced(u), layer(u))


def test_an_empty_batch() -> None:
    layer, u = ConvRoutingCapsules(2, 3, 4, 5, 3, padding=1), torch.randn(0, 2, 4, 6, 5)
    assert layer(u).shape == (0, 3, 5, 6, 5)
    mask, logits = torch.ones(0, 2, 6, 5, dtype=torch.bool), torch.randn(0, 6, 5, 18, 3)
    assert layer(u, logits=logits, mask=mask).shape == (0, 3, 5, 6, 5)


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


WANTED = "takes a shape that broadcasts to [B, H′, W′, I, J] with B = 2, H′ = 3, W′ = 3, I = 12, J = 3"


@pytest.mark.parametrize("shape", [(4,), (12,), (3, 12), (12, 12, 3), (4, 3, 12, 3), (2, 9, 12, 3), (1,) * 6])
def test_the_error_for_logits_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    layer, u = ConvRoutingCapsules(2, 3, 4, 5, **SLIDE), torch.randn(MAPS)
    for call in (layer, layer.couplings):
        with pytest.raises(ValueError, match=re.escape(f"logits: got shape {list(shape)}, {WANTED}") + "$"):
            call(u, logits=torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 2, 6, 5), (2, 5, 6), (1, 2, 5, 6), (2, 2, 1, 5, 6), (18, 12), ()])
def test_the_error_for_a_mask_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    layer, u = ConvRoutingCapsules(2, 3, 4, 5, **SLIDE), torch.randn(MAPS)
    message = f"mask: got shape {list(shape)}, takes [B, C, H, W] with B = 2, C = 2, H = 5, W = 6"
    for call in (layer, layer.couplings):
        with pytest.raises(ValueError, match=re.escape(message) + "$"):
            call(u, mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("logits", [0.0], TypeError, "got list, takes a torch.Tensor"),
        ("logits", torch.zeros(12, 3).double(), TypeError, "got dtype torch.float64, takes that of u, which"),
        ("logits", torch.zeros(12, 3).long(), ValueError, "got dtype torch.int64, takes float32"),
        ("logits", torch.zeros(12, 3).to_sparse(), ValueError, "got layout torch.sparse_coo, takes"),
        ("logits", torch.zeros(12, 3, device="meta"), ValueError, "got device meta, takes that of u, which"),
        ("mask", True, TypeError, "got bool, takes a torch.Tensor"),
        ("mask", torch.ones(2, 2, 5, 6), TypeError, "got dtype torch.float32, takes torch.bool: True where"),
        ("mask", (torch.ones(2, 2, 5, 6) > 0).to_sparse(), ValueError, "got layout torch.sparse_coo, takes"),
        ("mask", torch.ones(2, 2, 5, 6).bool().to("meta"), ValueError, "got device meta, takes that of u"),
    ],
)
def test_logits_and_masks_of_another_type(
    name: str, value: Any, error: type[Exception], message: str
) -> None:
    layer, u = ConvRoutingCapsules(2, 3, 4, 5, **SLIDE), torch.randn(MAPS)
    for call in (layer, layer.couplings, torch.fx.symbolic_trace(layer)):
        with pytest.raises(error, match=f"^{name}: {message}"):
            call(u, **{name: value})


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
