"""Forward-mode differentiation and torch.func: the reference formula supports both; no tangent is lost."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import capsops
from capsops import reference
from tests.capsops.cases import Shape, layer_inputs
from tests.capsops.compare import assert_close

SHAPE = Shape(2, 5, 3, 4, 3)
OPTIONS = [
    {},
    {"iterations": 0},
    {"iterations": 1, "leaky": True},
    {"iterations": 3, "leaky": True},
    {"iterations": 3, "detach": True},
]


def arguments(name: str) -> list[Tensor]:
    u, weight, bias = layer_inputs(SHAPE, bias=True)
    return {
        "squash": [u],
        "predictions": [u, weight],
        "dynamic_routing": [reference.predictions(u, weight), bias],
        "capsule_routing": [u, weight, bias],
    }[name]


def op_and_formula(
    name: str, **options: object
) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    """An op, its formula, and arguments for both."""
    op, formula = getattr(capsops, name), getattr(reference, name)
    return lambda *x: op(*x, **options), lambda *x: formula(*x, **options), arguments(name)


CASES = [
    ("squash", {}),
    ("squash", {"dim": 1}),
    ("predictions", {}),
    *(("dynamic_routing", options) for options in OPTIONS),
    *(("capsule_routing", options) for options in OPTIONS),
]


def with_logits(name: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    """As op_and_formula, of the first tensors and logits [I, J], one of them −inf, with a mask."""
    *inputs, _ = arguments(name)
    logits, mask = torch.randn(5, 3, dtype=torch.float64), torch.arange(5) < torch.tensor([[3], [5]])
    logits[1, 2] = -torch.inf

    def of_logits(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *x: function(*x[:-1], logits=x[-1], mask=mask, squash_output=False)

    return of_logits(getattr(capsops, name)), of_logits(getattr(reference, name)), [*inputs, logits]


def with_shared_predictions(name: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    """As op_and_formula, of a weight [J, D, K], or of û [B, I, D]."""
    op, formula, inputs = op_and_formula(name)
    if name == "capsule_routing":
        inputs[1] = inputs[1][0].clone()
    else:
        inputs[0] = inputs[0][:, :, 0].clone()
    return op, formula, inputs


@pytest.mark.parametrize("name", ["dynamic_routing", "capsule_routing"])
@pytest.mark.parametrize("case", [with_logits, with_shared_predictions])
def test_derivatives_of_routing_options(
    case: Callable[[str], tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]], name: str
) -> None:
    check_derivatives(*case(name))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_derivatives_agree_with_the_formula(name: str, options: dict[str, object]) -> None:
    check_derivatives(*op_and_formula(name, **options))


def check_derivatives(
    op: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: list[Tensor]
) -> None:
    """Those of torch.func and of forward mode, against the formula and against backward mode."""
    tangents = [torch.randn_like(x) for x in inputs]
    argnums = tuple(range(len(inputs)))
    value, tangent = torch.func.jvp(op, tuple(inputs), tuple(tangents))
    want_value, want_tangent = torch.func.jvp(formula, tuple(inputs), tuple(tangents))
    assert want_tangent.abs().max() > 1e-3
    assert_close(value, want_value)
    assert_close(tangent, want_tangent)

    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        assert_close(forward_ad.unpack_dual(op(*duals)).tangent, want_tangent)

    # Both modes of torch.func must agree with backward mode, which runs the op itself.
    jacobian = torch.autograd.functional.jacobian(op, tuple(inputs))
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        for got, want in zip(transform(op, argnums)(*inputs), jacobian, strict=True):
            assert_close(got, want, transform.__name__, tolerance=1e-11)


@pytest.mark.parametrize("name", ["squash", "capsule_routing"])
def test_hessian(name: str) -> None:
    op, formula, (x, *others) = op_and_formula(name)
    weights = torch.randn_like(formula(x, *others))
    got = torch.func.hessian(lambda x: (op(x, *others) * weights).sum())(x)
    want = torch.autograd.functional.hessian(lambda x: (op(x, *others) * weights).sum(), x)
    assert_close(got, want, tolerance=1e-10)


def test_gradients_of_each_sample() -> None:
    u, weight, bias = arguments("capsule_routing")

    def loss(weight: Tensor, sample: Tensor) -> Tensor:
        return capsops.capsule_routing(sample[None], weight, bias).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, u)
    for sample, got in zip(u, each, strict=True):
        leaf = weight.clone().requires_grad_()
        loss(leaf, sample).backward()
        assert_close(got, leaf.grad, tolerance=1e-11)


@pytest.mark.parametrize("mapped", [("logits",), ("mask",), ("logits", "mask")], ids="-".join)
@pytest.mark.parametrize("name", ["dynamic_routing", "capsule_routing", "couplings"])
def test_vmap_over_starting_logits_and_masks(impl: str, name: str, mapped: tuple[str, ...]) -> None:
    """Four of each, for the same capsules; what is not mapped is the first of the four."""
    inputs = arguments("dynamic_routing" if name == "dynamic_routing" else "capsule_routing")
    options = {
        "logits": torch.where(torch.rand(4, 5, 3) < 0.2, -torch.inf, torch.randn(4, 5, 3)).double(),
        "mask": torch.rand(4, 2, 5) < 0.7,
    }
    fixed = {option: x[0] for option, x in options.items() if option not in mapped}

    def function(*x: Tensor) -> Tensor:
        keywords = {**fixed, **dict(zip(mapped, x, strict=True))}
        return getattr(capsops, name)(*inputs, **keywords, impl=impl)

    each = [options[option] for option in mapped]
    got = torch.func.vmap(function)(*each)
    assert got.shape[0] == 4
    assert not torch.equal(got[0], got[1])
    assert_close(got, torch.stack([function(*x) for x in zip(*each, strict=True)]))
    last = torch.func.vmap(function, in_dims=-1, out_dims=1)(*[x.movedim(0, -1) for x in each])
    assert_close(last, got.movedim(0, 1))


@pytest.mark.parametrize("name", ["dynamic_routing", "capsule_routing"])
def test_gradients_of_each_sample_with_its_logits_and_mask(name: str) -> None:
    """Of the shared parameters and of the sample's own logits."""
    first, *shared = arguments(name)
    logits, mask = torch.randn(2, 5, 3, dtype=torch.float64), torch.arange(5) < torch.tensor([[3], [5]])
    logits[1, 2] = -torch.inf

    def loss(shared: list[Tensor], logits: Tensor, sample: Tensor, mask: Tensor) -> Tensor:
        v = getattr(capsops, name)(sample[None], *shared, logits=logits, mask=mask[None])
        return v.square().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1))
    of_shared, of_logits = torch.func.vmap(gradient, in_dims=(None, 0, 0, 0))(shared, logits, first, mask)
    for b in range(2):
        leaves = [x.clone().requires_grad_() for x in (*shared, logits[b])]
        loss(leaves[:-1], leaves[-1], first[b], mask[b]).backward()
        for got, leaf in zip((*of_shared, of_logits), leaves, strict=True):
            assert_close(got[b], leaf.grad, tolerance=1e-11)


def test_a_module_under_functional_call() -> None:
    layer = capsops.nn.RoutingCapsules(5, 3, 4, 6)
    u = torch.randn(2, 5, 4)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, weights, (u,)).square().sum()

    got = torch.func.grad(loss)(dict(layer.named_parameters()))
    layer(u).square().sum().backward()
    for name, weight in layer.named_parameters():
        assert_close(got[name], weight.grad, name, tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_numbers_are_summed_in_float32(dtype: torch.dtype) -> None:
    u, weight, bias = (x.to(dtype) for x in arguments("capsule_routing"))
    tangent = torch.randn_like(u)
    results = torch.func.jvp(lambda u: capsops.capsule_routing(u, weight, bias), (u,), (tangent,))
    want = torch.func.jvp(
        lambda u: reference.capsule_routing(u, weight.float(), bias.float()), (u.float(),), (tangent.float(),)
    )
    for got, exact in zip(results, want, strict=True):
        assert_close(got, exact.to(dtype), tolerance=torch.finfo(dtype).eps)


@pytest.mark.parametrize("with_bias", [False, True])
def test_autocast(with_bias: bool) -> None:
    u, weight, bias = (x.float() for x in arguments("capsule_routing"))
    bias = bias if with_bias else None
    with torch.autocast("cpu", torch.bfloat16):
        v, tangent = torch.func.jvp(
            lambda u: capsops.capsule_routing(u, weight, bias), (u,), (torch.ones_like(u),)
        )
        assert_close(v, capsops.capsule_routing(u, weight, bias), tolerance=0.01)
    assert (v.dtype, tangent.dtype) == (torch.bfloat16, torch.bfloat16)


def test_of_the_named_backends_only_the_reference_supports_torch_func(impl: str) -> None:
    message = f"impl: got {impl!r}, takes 'auto' or 'reference' in forward-mode"
    expectation = nullcontext() if impl == "reference" else pytest.raises(ValueError, match=message)
    s = torch.randn(2, 3)

    def grad_of_vmap(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return torch.func.grad(lambda s: torch.func.vmap(function)(s).sum())

    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian, grad_of_vmap):
        with expectation:
            got = transform(lambda s: capsops.squash(s, impl=impl).sum())(s)
            assert_close(got, transform(lambda s: reference.squash(s).sum())(s), tolerance=1e-5)
    with expectation, capsops.use_impl(impl), forward_ad.dual_level():
        assert forward_ad.unpack_dual(capsops.squash(forward_ad.make_dual(s, s))).tangent.any()


@pytest.mark.parametrize(
    ("function", "sizes", "message"),
    [
        (capsops.squash, [()], "s: got a scalar"),
        (capsops.predictions, [(2, 3, 4), (3, 5, 6, 7)], r"u: got shape \[2, 3, 4\], takes"),
        (capsops.dynamic_routing, [(3, 4, 5)], r"u_hat: got shape \[3, 4, 5\] without `bias`"),
        (capsops.dynamic_routing, [(4, 5)], r"u_hat: got shape \[4, 5\], takes"),
        (
            capsops.capsule_routing,
            [(2, 3, 7), (5, 6, 8)],
            r"weight: got shape \[5, 6, 8\], takes \[J, D, K\]",
        ),
        (capsops.capsule_routing, [(2, 3, 7), (3, 5, 6, 7), (6, 5)], r"bias: got shape \[6, 5\], takes"),
    ],
)
def test_invalid_arguments_are_rejected(
    function: Callable[..., Tensor], sizes: list[tuple[int, ...]], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        torch.func.grad(lambda *x: function(*x).sum())(*map(torch.zeros, sizes))


def test_a_named_backend_supports_vmap(impl: str) -> None:
    s = torch.randn(4, 2, 3)
    got = torch.func.vmap(lambda s: capsops.squash(s, impl=impl))(s)
    assert_close(got, capsops.squash(s, impl=impl), tolerance=1e-6)


def test_tensors_without_a_tangent_are_passed_to_the_backend(
    impl: str, change_backend: Callable[..., None]
) -> None:
    calls = []
    original = capsops.dispatch.BACKENDS[impl].functions["squash"]
    change_backend(impl, squash=lambda s, dim: calls.append(impl) or original(s, dim))
    with forward_ad.dual_level():
        capsops.squash(torch.ones(3), impl=impl)
    assert calls == [impl]


def test_an_op_called_by_name_rejects_a_tangent() -> None:
    s = torch.randn(3, 4)
    message = (
        r"^s: got a tensor with a tangent, takes one without: torch.ops.capsops.squash has no derivative"
    )
    with forward_ad.dual_level(), pytest.raises(ValueError, match=message):
        torch.ops.capsops.squash(forward_ad.make_dual(s, s), 1, "reference")
    with pytest.raises(ValueError, match=message):
        torch.func.jvp(lambda s: torch.ops.capsops.squash(s, 1, "reference"), (s,), (s,))
    with forward_ad.dual_level():
        plain = torch.ops.capsops.squash(s, 1, "reference")
    assert torch.equal(plain, capsops.squash(s, impl="reference"))
