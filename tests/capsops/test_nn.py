"""capsops.nn: shapes, the order of capsules, initialisation, loading weights of other layouts, training."""

import copy
import re
from collections.abc import Iterator
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import capsops
from capsops.nn import PrimaryCapsules, RoutingCapsules, Squash
from tests.capsops.compare import assert_close


@pytest.fixture(autouse=True)
def every_backend(impl: str) -> Iterator[None]:
    """Runs every test of this file with every backend."""
    with capsops.use_impl(impl):
        yield


@pytest.mark.parametrize("dim", [-1, 1, 0])
def test_squash(dim: int) -> None:
    s = torch.randn(3, 4, 5)
    assert torch.equal(Squash(dim)(s), capsops.squash(s, dim))
    assert repr(Squash(dim)) == f"Squash(dim={dim})"
    assert torch.equal(Squash()(s), capsops.squash(s))


@pytest.mark.parametrize(
    ("in_channels", "capsules", "dim", "kernel", "stride", "size"),
    [(256, 32, 8, 9, 2, 20), (1, 1, 1, 1, 1, 3), (3, 4, 5, 3, 1, 7), (2, 3, 4, 5, 3, 12)],
)
def test_number_of_primary_capsules_is_types_times_positions(
    in_channels: int, capsules: int, dim: int, kernel: int, stride: int, size: int
) -> None:
    layer = PrimaryCapsules(in_channels, capsules, dim, kernel, stride)
    side = (size - kernel) // stride + 1
    assert layer(torch.randn(2, in_channels, size, size)).shape == (2, capsules * side**2, dim)


def test_primary_capsules_have_stride_2_by_default() -> None:
    layer = PrimaryCapsules(3, 4, 5, 3)
    assert (layer.conv.stride, layer.conv.padding) == ((2, 2), (0, 0))


@pytest.mark.parametrize(("padding", "positions"), [(1, 16), ((0, 2), 15)])
def test_primary_capsules_pad_with_zeros(padding: int | tuple[int, int], positions: int) -> None:
    layer, x = PrimaryCapsules(4, 2, 8, 3, padding=padding), torch.randn(1, 4, 8, 8)
    assert layer(x).shape == (1, 2 * positions, 8)
    tall, wide = padding if isinstance(padding, tuple) else (padding, padding)
    unpadded = PrimaryCapsules(4, 2, 8, 3)
    unpadded.load_state_dict(layer.state_dict())
    assert_close(layer(x), unpadded(nn.functional.pad(x, (wide, wide, tall, tall))), tolerance=1e-6)
    with pytest.raises(ValueError, match=r"^padding: got -1, takes 0 or more$"):
        PrimaryCapsules(4, 2, 8, 3, padding=-1)


def test_a_primary_capsule_is_dim_channels_at_one_position() -> None:
    """Channel c of the convolution is set to image + 100 c: two types of three channels, 2 × 3 positions."""
    layer = PrimaryCapsules(1, 2, 3, 1, stride=1)
    with torch.no_grad():
        layer.conv.weight.fill_(1)
        layer.conv.bias.copy_(100 * torch.arange(6))
    image = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    want = [
        [pixel + 100.0 * channel for channel in channels]
        for channels in ((0, 1, 2), (3, 4, 5))
        for pixel in (1, 2, 3, 4, 5, 6)
    ]
    assert_close(layer(image[None, None]), capsops.squash(torch.tensor([want])), tolerance=1e-6)


def test_primary_capsules_are_squashed_and_train() -> None:
    layer = PrimaryCapsules(2, 3, 4, 3)
    u = layer(10 * torch.randn(5, 2, 9, 9))
    assert (u.norm(dim=-1) < 1).all()
    u.square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(1, 65, 9), (2, 3, 9, 9), (2, 1, 9), (1, 1, 1, 9, 9)])
def test_primary_capsules_reject_images_of_other_shapes(shape: tuple[int, ...]) -> None:
    layer = PrimaryCapsules(1, 8, 4, 3)
    with pytest.raises(ValueError, match=rf"^x: got shape {re.escape(str(list(shape)))}, takes .* C = 1$"):
        layer(torch.randn(shape))


def test_primary_capsules_accept_an_empty_batch() -> None:
    assert PrimaryCapsules(2, 3, 4, 3)(torch.randn(0, 2, 9, 9)).shape == (0, 48, 4)


def test_routing_capsules_call_capsule_routing() -> None:
    layer = RoutingCapsules(7, 3, 4, 5, iterations=2, leaky=True)
    nn.init.normal_(layer.bias)
    assert layer.weight.shape == (7, 3, 5, 4)
    assert layer.bias.shape == (3, 5)
    u = torch.randn(2, 7, 4)
    want = capsops.capsule_routing(u, layer.weight, layer.bias, iterations=2, leaky=True)
    assert torch.equal(layer(u), want)
    want = capsops.couplings(u, layer.weight, layer.bias, iterations=2, leaky=True)
    assert torch.equal(layer.couplings(u), want)
    assert not layer.couplings(u).requires_grad


def test_detach_is_passed_to_the_op() -> None:
    u = torch.randn(2, 7, 4, dtype=torch.float64)
    layer = RoutingCapsules(7, 3, 4, 5, detach=True).double()
    layer(u).sum().backward()
    weight, bias = (x.detach().clone().requires_grad_() for x in (layer.weight, layer.bias))
    capsops.capsule_routing(u, weight, bias, detach=True).sum().backward()
    assert torch.equal(layer.weight.grad, weight.grad)
    capsops.capsule_routing(u, weight, bias, detach=False).sum().backward()
    assert not torch.allclose(2 * layer.weight.grad, weight.grad)


def test_three_iterations_and_a_bias_are_the_default() -> None:
    layer = RoutingCapsules(7, 3, 4, 5)
    assert (layer.iterations, layer.leaky, layer.detach) == (3, False, False)
    assert torch.equal(layer.bias, torch.zeros(3, 5))
    assert RoutingCapsules(7, 3, 4, 5, bias=False).bias is None


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("shape", [(1152, 10, 8, 16), (32, 5, 4, 8), (100, 1, 16, 32), (10, 30, 16, 4)])
def test_sums_of_the_first_pass_have_a_length_near_0_3(
    shape: tuple[int, ...], leaky: bool, iterations: int
) -> None:
    """‖s‖ of the first pass, for inputs that are squashed normal vectors; ‖v‖ = ‖s‖² / (1 + ‖s‖²)."""
    layer = RoutingCapsules(*shape, iterations=iterations, leaky=leaky)
    u = capsops.squash(torch.randn(200, shape[0], shape[2]))
    first = min(iterations, 1)
    v = capsops.capsule_routing(u, layer.weight, layer.bias, iterations=first, leaky=leaky).norm(dim=-1)
    s = (v / (1 - v)).sqrt()
    assert 0.25 < s.square().mean().sqrt() < 0.36


@pytest.mark.parametrize("sizes", [(1152, 10, 8, 16), (32, 5, 16, 8)])
def test_sums_of_a_shared_layer_have_a_length_near_0_3(sizes: tuple[int, ...]) -> None:
    layer = RoutingCapsules(*sizes, iterations=1, shared=True)
    v = layer(capsops.squash(torch.randn(200, sizes[0], sizes[2]))).norm(dim=-1)
    assert 0.25 < (v / (1 - v)).mean().sqrt() < 0.36


@pytest.mark.parametrize("in_capsules", [7, 1, 40])
def test_a_shared_layer_takes_any_number_of_input_capsules(in_capsules: int) -> None:
    """And equals a layer whose matrices are all the same."""
    layer = RoutingCapsules(7, 3, 4, 5, shared=True, leaky=True).double()
    nn.init.normal_(layer.bias)
    assert layer.shared
    assert layer.weight.shape == (3, 5, 4)
    same = layer.weight.expand(in_capsules, -1, -1, -1)
    full = RoutingCapsules.from_weight(same, "IJDK", bias=layer.bias, leaky=True)
    assert not full.shared
    u = torch.randn(2, in_capsules, 4, dtype=torch.float64)
    assert_close(layer(u), full(u))
    assert_close(layer.couplings(u), full.couplings(u))
    for x in (layer, full):
        x(u).square().sum().backward()
    assert_close(layer.weight.grad, full.weight.grad.sum(0), tolerance=1e-10)
    assert_close(layer.bias.grad, full.bias.grad, tolerance=1e-10)


@pytest.mark.parametrize("shared", [False, True])
def test_starting_logits_and_a_mask_are_passed_to_the_op(shared: bool) -> None:
    layer = RoutingCapsules(7, 3, 4, 5, shared=shared)
    u, start = torch.randn(2, 7, 4), torch.randn(7, 3, requires_grad=True)
    start.data[2, 1] = -torch.inf
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    options = {"logits": start, "mask": mask}
    want = capsops.capsule_routing(u, layer.weight, layer.bias, **options)
    assert torch.equal(layer(u, **options), want)
    assert not torch.allclose(layer(u, mask=mask), want)
    assert not torch.allclose(layer(u, logits=start), want)
    c = layer.couplings(u, **options)
    assert torch.equal(c, capsops.couplings(u, layer.weight, layer.bias, **options))
    assert (c[:, 2, 1] == 0).all()
    assert (c[1, 4:] == 0).all()
    assert_close(want[1:], layer(u.masked_fill(~mask[..., None], torch.nan), **options)[1:])
    want.sum().backward()
    assert start.grad[2, 1] == 0
    assert (start.grad[0] != 0).all()


def test_state_dict_of_a_shared_layer() -> None:
    layer, other = RoutingCapsules(7, 3, 4, 5, shared=True), RoutingCapsules(9, 3, 4, 5, shared=True)
    assert set(layer.state_dict()) == {"weight", "bias"}
    other.load_state_dict(layer.state_dict())
    u = torch.randn(2, 7, 4)
    assert torch.equal(layer(u), other(u))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        RoutingCapsules(7, 3, 4, 5).load_state_dict(layer.state_dict())


def test_reset_parameters_samples_new_weights() -> None:
    layer = RoutingCapsules(7, 3, 4, 5)
    before = layer.weight.detach().clone()
    nn.init.ones_(layer.bias)
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    assert torch.equal(layer.bias, torch.zeros(3, 5))
    torch.manual_seed(3)
    layer.reset_parameters()
    again = layer.weight.detach().clone()
    torch.manual_seed(3)
    layer.reset_parameters()
    assert torch.equal(layer.weight, again)


LAYOUTS = [
    *("".join(letters) for letters in permutations("IJDK")),
    "1IJDK", "1JIDK", "JI1KD", "IJDK1", "1I1JDK", "1JIKD1",
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [(7, 3, 5, 4), (1, 3, 5, 4), (7, 1, 1, 4)])
def test_from_weight(layout: str, sizes: tuple[int, ...]) -> None:
    """Element [i, j, d, k] is looked up by its letters; axes that are 1 by chance are not dropped."""
    size = dict(zip("IJDK", sizes, strict=True))
    weight = torch.randn([size.get(letter, 1) for letter in layout], dtype=torch.float64)
    bias = torch.randn(1, size["J"], size["D"], 1, dtype=torch.float64)
    layer = RoutingCapsules.from_weight(weight, layout, bias=bias, iterations=2, leaky=True, detach=True)
    assert (layer.iterations, layer.leaky, layer.detach) == (2, True, True)
    assert layer.weight.dtype == torch.float64
    assert layer.weight.is_contiguous()
    assert layer.weight.requires_grad
    assert layer.weight.shape == sizes
    for index in torch.cartesian_prod(*(torch.arange(n) for n in sizes)).tolist():
        place = dict(zip("IJDK", index, strict=True))
        assert layer.weight[tuple(index)] == weight[tuple(place.get(letter, 0) for letter in layout)]
    assert torch.equal(layer.bias, bias.reshape(size["J"], size["D"]))


@pytest.mark.parametrize("layout", ["IK(JD)", "I(JD)K", "(DJ)IK", "1I(DJ)K1"])
def test_from_weight_with_one_axis_for_out_capsules_and_their_dimension(layout: str) -> None:
    weight, parts = torch.randn(7, 3, 5, 4), layout.replace("(", "").replace(")", "")
    letters = [letter for letter in parts if letter != "1"]
    merged = weight.permute(["IJDK".index(letter) for letter in letters])
    both = min(letters.index("J"), letters.index("D"))
    merged = merged.flatten(both, both + 1)
    merged = merged[None, ..., None] if "1" in layout else merged
    assert torch.equal(RoutingCapsules.from_weight(merged, layout, out_capsules=3).weight, weight)


@pytest.mark.parametrize(
    ("layout", "out_capsules", "message"),
    [
        ("IK(JD)", None, r"out_capsules: got None, takes J: in layout 'IK\(JD\)' it shares an axis with D"),
        ("IK(JD)", 4, r"out_capsules: got 4, takes a divisor of 15, the size of the axis of J and D"),
        ("IK(JD)", 0, "out_capsules: got 0, takes 1 or more"),
        ("IKJD", 3, "out_capsules: got 3, takes None: in layout 'IKJD' J is an axis by itself"),
        ("1IK(JD)", 3, r"layout: got '1IK\(JD\)' for a weight of shape \[7, 4, 15\]"),
        ("IK(JK)", None, r"layout: got 'IK\(JK\)'"),
    ],
)
def test_from_weight_rejects_invalid_shared_axes(layout: str, out_capsules: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        RoutingCapsules.from_weight(torch.zeros(7, 4, 15), layout, out_capsules=out_capsules)


@pytest.mark.parametrize("layout", ["JDK", "KJD", "1DJK"])
def test_from_weight_that_all_input_capsules_share(layout: str) -> None:
    weight = torch.randn(3, 5, 4)
    letters = layout.replace("1", "")
    other = weight.permute(["JDK".index(letter) for letter in letters])
    layer = RoutingCapsules.from_weight(other.unsqueeze(0) if "1" in layout else other, layout)
    assert layer.shared
    assert torch.equal(layer.weight, weight)
    u = torch.randn(2, 7, 4)
    assert torch.equal(layer(u), capsops.capsule_routing(u, weight))


def test_from_weight_copies_the_weight() -> None:
    weight = nn.Parameter(torch.randn(7, 3, 5, 4))
    layer = RoutingCapsules.from_weight(weight, "IJDK")
    assert layer.bias is None
    with torch.no_grad():
        layer.weight.zero_()
    assert weight.abs().sum() > 0
    layer(torch.randn(2, 7, 4)).sum().backward()
    assert weight.grad is None


def test_from_weight_agrees_with_a_common_implementation() -> None:
    """Its weight is [1, J, I, D, K], its predictions are a matmul, and it stores the logits."""
    weight = torch.randn(1, 3, 7, 5, 4, dtype=torch.float64)
    u = torch.randn(2, 7, 4, dtype=torch.float64)
    u_hat = (weight @ u[:, None, :, :, None]).squeeze(-1)  # [B, J, I, D]
    logits = torch.zeros(2, 3, 7, 1, dtype=torch.float64)
    for _ in range(3):
        s = (logits.softmax(1) * u_hat).sum(2)
        norm = s.norm(dim=-1, keepdim=True)
        v = norm**2 / (1 + norm**2) * s / norm
        logits = logits + (u_hat * v[:, :, None]).sum(-1, keepdim=True)
    assert_close(RoutingCapsules.from_weight(weight, "1JIDK")(u), v)


@pytest.mark.parametrize(
    ("sizes", "layout", "message"),
    [
        (
            (7, 3, 5, 4),
            "IJD",
            r"layout: got 'IJD' for a weight of shape \[7, 3, 5, 4\], takes a letter for each axis",
        ),
        ((7, 3, 5, 4), "IJDX", r"layout: got 'IJDX' for a weight of shape \[7, 3, 5, 4\]"),
        ((7, 3, 5, 4), "IJDD", "layout: got 'IJDD'"),
        ((7, 3, 5, 4), "1IJDK", r"layout: got '1IJDK' for a weight of shape \[7, 3, 5, 4\]"),
        ((7, 3, 5), "IJD", "layout: got 'IJD'"),
        (
            (2, 7, 3, 5, 4),
            "1IJDK",
            r"layout: got '1IJDK', where 1 stands for an axis that is not 1 in \[2, 7, 3, 5, 4\]",
        ),
    ],
)
def test_from_weight_rejects_invalid_layouts(sizes: tuple[int, ...], layout: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        RoutingCapsules.from_weight(torch.zeros(sizes), layout)


def test_from_weight_rejects_invalid_biases() -> None:
    with pytest.raises(ValueError, match=r"^bias: got shape \[14\], takes \[J, D\] with J = 3 and D = 5, "):
        RoutingCapsules.from_weight(torch.zeros(7, 3, 5, 4), "IJDK", bias=torch.zeros(14))
    with pytest.raises(ValueError, match=r"^bias: got shape \[5, 3\], takes"):
        RoutingCapsules.from_weight(torch.zeros(7, 3, 5, 4), "IJDK", bias=torch.zeros(5, 3))
    with pytest.raises(ValueError, match="^bias: got device meta, takes that of weight, which is cpu$"):
        RoutingCapsules.from_weight(torch.zeros(7, 3, 5, 4), "IJDK", bias=torch.zeros(15, device="meta"))


def test_the_error_for_a_wrong_input_names_the_argument() -> None:
    with pytest.raises(ValueError, match=r"^u: got shape \[2, 8, 4\], takes \[B, I, K\] with I = 7, K = 4$"):
        RoutingCapsules(7, 3, 4, 5)(torch.zeros(2, 8, 4))
    with pytest.raises(ValueError, match=r"^u: got shape \[2, 28\], takes \[B, I, K\] with I = 7, K = 4$"):
        RoutingCapsules(7, 3, 4, 5)(torch.zeros(2, 28))


@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_round_trip(bias: bool) -> None:
    layer, other = (RoutingCapsules(7, 3, 4, 5, bias=bias) for _ in range(2))
    assert set(layer.state_dict()) == ({"weight", "bias"} if bias else {"weight"})
    u = torch.randn(2, 7, 4)
    assert not torch.equal(layer(u), other(u))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(u), other(u))


def test_deepcopy_is_independent() -> None:
    layer = RoutingCapsules(7, 3, 4, 5, iterations=2, leaky=True, detach=True)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied.weight, layer.weight)
    assert repr(copied) == repr(layer)
    with torch.no_grad():
        copied.weight.zero_()
    assert layer.weight.abs().sum() > 0


def test_repr_shows_the_arguments() -> None:
    assert repr(RoutingCapsules(7, 3, 4, 5, iterations=2, bias=False, leaky=True)) == (
        "RoutingCapsules(7, 3, in_dim=4, out_dim=5, iterations=2, bias=False, leaky=True, detach=False)"
    )
    assert repr(RoutingCapsules(7, 3, 4, 5, shared=True)) == (
        "RoutingCapsules(7, 3, in_dim=4, out_dim=5, iterations=3, bias=True, leaky=False, detach=False,"
        " shared=True)"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_another_dtype(dtype: torch.dtype) -> None:
    layer = RoutingCapsules(7, 3, 4, 5).to(dtype)
    assert layer(torch.randn(2, 7, 4).to(dtype)).dtype == dtype


def margin_loss(v: Tensor, labels: Tensor) -> Tensor:
    length, present = v.norm(dim=-1), nn.functional.one_hot(labels, v.shape[1])
    return (
        (present * (0.9 - length).relu() ** 2 + 0.5 * (1 - present) * (length - 0.1).relu() ** 2)
        .sum(1)
        .mean()
    )


@pytest.mark.parametrize("options", [{}, {"iterations": 0, "bias": False}, {"leaky": True, "detach": True}])
def test_a_small_network_learns(options: dict) -> None:
    """Four classes of noisy images: the loss falls to a fifth, and the longest capsule shows the class."""
    network = nn.Sequential(PrimaryCapsules(1, 4, 8, 5), RoutingCapsules(4 * 16, 4, 8, 8, **options))
    prototypes = torch.randn(4, 1, 12, 12)
    labels = torch.arange(32) % 4
    images = prototypes[labels] + 0.3 * torch.randn(32, 1, 12, 12)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    losses = []
    for _ in range(30):
        loss = margin_loss(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5
    assert (network(images).norm(dim=-1).argmax(1) == labels).float().mean() > 0.95


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"iterations": -1}, ValueError, "iterations: got -1, takes 0"),
        ({"iterations": 2.0}, TypeError, "iterations: got float, takes an int"),
        ({"iterations": None}, TypeError, "iterations: got NoneType, takes an int"),
        ({"leaky": 1}, TypeError, "leaky: got int, takes a bool"),
        ({"detach": "no"}, TypeError, "detach: got str, takes a bool"),
    ],
)
def test_options_are_checked_when_a_layer_is_made(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        RoutingCapsules(7, 3, 4, 5, **options)
    with pytest.raises(error, match=f"^{message}"):
        RoutingCapsules.from_weight(torch.zeros(7, 3, 5, 4), "IJDK", **options)


def test_shared_is_a_bool() -> None:
    with pytest.raises(TypeError, match="^shared: got int, takes a bool$"):
        RoutingCapsules(7, 3, 4, 5, shared=1)


def test_from_weight_rejects_what_is_not_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"^weight: got ndarray, takes a torch\.Tensor$"):
        RoutingCapsules.from_weight(np.zeros((7, 3, 5, 4)), "IJDK")
    with pytest.raises(TypeError, match=r"^bias: got list, takes a torch\.Tensor$"):
        RoutingCapsules.from_weight(torch.zeros(7, 3, 5, 4), "IJDK", bias=[0.0] * 15)


def test_a_layer_of_one_input_capsule_is_not_shared() -> None:
    """Its weight is [1, J, D, K], which the function takes for one that all input capsules share."""
    layer = RoutingCapsules(1, 3, 4, 5)
    assert layer(torch.randn(2, 1, 4)).shape == (2, 3, 5)
    for call in (layer, layer.couplings):
        with pytest.raises(ValueError, match=r"^u: got shape \[2, 6, 4\], takes \[B, I, K\] with I = 1 \("):
            call(torch.randn(2, 6, 4))
