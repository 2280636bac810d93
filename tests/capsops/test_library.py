"""The ops as registered with torch.library: opcheck, second derivatives, uses by autograd."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

import capsops
from capsops import dispatch, reference
from capsops.backends.backend import UNSQUASHED
from tests.capsops.cases import Options, Shape, layer_inputs, routing_inputs
from tests.capsops.compare import assert_close
from tests.capsops.routing_options import options_of_call, skip_unless_supported
from tests.tiers import slow

OPS = torch.ops.capsops
SHAPE = Shape(3, 5, 4, 3, 2)


def leaf(*sizes: int) -> Tensor:
    return torch.randn(sizes, requires_grad=True)


def sums(iterations: int) -> Tensor:
    """s of every pass, which a forward op saves."""
    return torch.randn(max(iterations, 1), 3, 4, 3)


def op_calls() -> dict[str, tuple[Any, ...]]:
    """Calls of every op, with each of its options; the last argument, `impl`, is left out."""
    B, I, J, D, K = SHAPE  # noqa: E741
    u, weight, bias = leaf(B, I, K), leaf(I, J, D, K), leaf(J, D)
    u_hat, grad_u_hat, grad = leaf(B, I, J, D), leaf(B, I, J, D), leaf(B, J, D)
    s, grad_s = leaf(B, J, D), leaf(B, J, D)
    none = None, None  # neither logits nor a mask
    return {
        "squash": (OPS.squash, s, 2),
        "squash of a middle dim": (OPS.squash, s, 1),
        "squash_backward": (OPS.squash_backward, grad_s, s, 2),
        "predictions": (OPS.predictions, u, weight),
        "predictions of a fixed weight": (OPS.predictions, u, weight.detach()),
        "predictions_backward": (OPS.predictions_backward, grad_u_hat, u, weight, True, True),
        "predictions_backward for u": (OPS.predictions_backward, grad_u_hat, u, weight, True, False),
        "predictions_backward for weight": (OPS.predictions_backward, grad_u_hat, u, weight, False, True),
        "dynamic_routing": (OPS.dynamic_routing, u_hat, bias, *none, 3, False, False, True),
        "dynamic_routing without bias, leaky": (
            OPS.dynamic_routing, u_hat, None, *none, 2, True, False, True,
        ),
        "dynamic_routing, detached": (OPS.dynamic_routing, u_hat, bias, *none, 2, False, True, True),
        "dynamic_routing_backward": (
            OPS.dynamic_routing_backward, grad, u_hat, bias, *none, sums(2), 2, False, False, True, False,
        ),
        "dynamic_routing_backward of three passes": (
            OPS.dynamic_routing_backward, grad, u_hat, bias, *none, sums(3), 3, False, False, True, False,
        ),
        "dynamic_routing_backward without bias, leaky": (
            OPS.dynamic_routing_backward, grad, u_hat, None, *none, sums(2), 2, True, False, True, False,
        ),
        "dynamic_routing_backward, no routing": (
            OPS.dynamic_routing_backward, grad, u_hat, bias, *none, sums(0), 0, False, False, True, False,
        ),
        "capsule_routing": (OPS.capsule_routing, u, weight, bias, *none, 3, False, False, True),
        "capsule_routing without bias, leaky": (
            OPS.capsule_routing, u, weight, None, *none, 2, True, False, True,
        ),
        "capsule_routing, no routing": (OPS.capsule_routing, u, weight, bias, *none, 0, False, False, True),
        "capsule_routing of fixed input, detached": (
            OPS.capsule_routing, u.detach(), weight, bias, *none, 2, False, True, True,
        ),
        "capsule_routing_backward": (
            OPS.capsule_routing_backward, grad, u, weight, bias, *none, sums(2), 2, False, False, True,
            True, True, False,
        ),
        "capsule_routing_backward of three passes": (
            OPS.capsule_routing_backward, grad, u, weight, bias, *none, sums(3), 3, False, False, True,
            True, True, False,
        ),
        "capsule_routing_backward for u, leaky": (
            OPS.capsule_routing_backward, grad, u, weight, None, *none, sums(2), 2, True, False, True,
            True, False, False,
        ),
        "capsule_routing_backward for weight, detached": (
            OPS.capsule_routing_backward, grad, u, weight, bias, *none, sums(2), 2, False, True, True,
            False, True, False,
        ),
        "dynamic_routing, not squashed": (
            OPS.dynamic_routing, u_hat, bias, *none, 3, False, False, False,
        ),
        "dynamic_routing_backward, not squashed": (
            OPS.dynamic_routing_backward, grad, u_hat, bias, *none, sums(3), 3, False, False, False, False,
        ),
        "capsule_routing, not squashed": (
            OPS.capsule_routing, u, weight, bias, *none, 2, True, False, False,
        ),
        "capsule_routing_backward, not squashed": (
            OPS.capsule_routing_backward, grad, u, weight, bias, *none, sums(2), 2, True, True, False,
            True, True, False,
        ),
        "couplings": (OPS.couplings, u.detach(), weight.detach(), bias.detach(), *none, 3, False),
        "couplings, no routing": (OPS.couplings, u.detach(), weight.detach(), None, *none, 0, False),
        **calls_with_options(),
    }  # fmt: skip


def calls_with_options() -> dict[str, tuple[Any, ...]]:
    """Calls with starting logits, a mask, and predictions that input or output capsules share."""
    B, I, J, D, K = SHAPE  # noqa: E741
    u, weight, bias = leaf(B, I, K), leaf(I, J, D, K), leaf(J, D)
    shared, alike, u_hat, grad = leaf(J, D, K), leaf(B, I, D), leaf(B, I, J, D), leaf(B, J, D)
    mask, options = torch.arange(I) < torch.arange(1, B + 1)[:, None], (2, False, False, True)

    def shared_backward(logits: Tensor | None, *needs: bool) -> tuple[Any, ...]:
        return OPS.capsule_routing_backward, grad, u, shared, bias, logits, mask, sums(2), *options, *needs

    calls: dict[str, tuple[Any, ...]] = {}
    for sizes in ((), (J,), (I, J), (1, I, J), (B, 1, J), (B, I, 1), (B, I, J)):
        logits, name = leaf(*sizes), f"with logits {list(sizes)}"
        calls |= {
            f"dynamic_routing {name}": (OPS.dynamic_routing, u_hat, bias, logits, None, *options),
            f"dynamic_routing_backward {name}": (
                OPS.dynamic_routing_backward, grad, u_hat, bias, logits, None, sums(2), *options, True,
            ),
            f"capsule_routing {name}": (OPS.capsule_routing, u, weight, bias, logits, None, *options),
            f"capsule_routing_backward {name}": (
                OPS.capsule_routing_backward, grad, u, weight, bias, logits, None, sums(2), *options,
                True, True, True,
            ),
            f"couplings {name}": (OPS.couplings, u, weight, bias, logits, None, 2, False),
        }  # fmt: skip
    logits = leaf(I, J)
    calls |= {
        "dynamic_routing with a mask": (OPS.dynamic_routing, u_hat, bias, None, mask, *options),
        "dynamic_routing, the same for all outputs": (OPS.dynamic_routing, alike, bias, None, mask, *options),
        "dynamic_routing, alike, with logits": (OPS.dynamic_routing, alike, None, logits, mask, *options),
        "dynamic_routing_backward with a mask": (
            OPS.dynamic_routing_backward, grad, u_hat, bias, None, mask, sums(2), *options, False,
        ),
        "dynamic_routing_backward, the same for all outputs": (
            OPS.dynamic_routing_backward, grad, alike, None, logits, mask, sums(2), *options, True,
        ),
        "dynamic_routing_backward, no routing, with logits": (
            OPS.dynamic_routing_backward, grad, u_hat, bias, logits, mask, sums(0), 0, False, False, True,
            True,
        ),
        "capsule_routing with a mask": (OPS.capsule_routing, u, weight, bias, None, mask, *options),
        "capsule_routing of a shared weight": (OPS.capsule_routing, u, shared, bias, None, None, *options),
        "capsule_routing of a shared weight with four axes, leaky": (
            OPS.capsule_routing, u, shared[None], None, None, None, 3, True, False, True,
        ),
        "capsule_routing with all options, detached": (
            OPS.capsule_routing, u, shared, bias, logits, mask, 3, True, True, False,
        ),
        "capsule_routing_backward of a shared weight": shared_backward(None, True, True, False),
        "capsule_routing_backward with all options": shared_backward(logits, True, True, True),
        "capsule_routing_backward for logits": shared_backward(logits, False, False, True),
        "capsule_routing_backward of fixed logits": shared_backward(logits, True, True, False),
        "couplings with all options": (OPS.couplings, u, shared, bias, logits, mask, 3, True),
        "couplings with a mask, no routing": (OPS.couplings, u, weight, bias, None, mask, 0, False),
    }  # fmt: skip
    return calls


CALLS = list(op_calls())


def test_every_op_is_checked() -> None:
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "capsops::" in name}
    assert names == {call.split()[0].rstrip(",") for call in CALLS}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(impl: str, name: str) -> None:
    op, *args = op_calls()[name]
    skip_unless_supported(impl, options_of_call(op, args))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.default, (*args, impl), test_utils=checks)


def check_traced(impl: str, name: str) -> None:
    op, *args = op_calls()[name]
    torch.library.opcheck(op.default, (*args, impl), test_utils="test_aot_dispatch_dynamic")


# Tracing takes seconds, and longer with each pass: one call per op, and only one backend in the fast tier.
TRACED = [name for name in CALLS if name.isidentifier()]
ALSO_TRACED = [
    "dynamic_routing, alike, with logits",
    "dynamic_routing_backward, the same for all outputs",
    "capsule_routing with all options, detached",
    "capsule_routing_backward with all options",
    "couplings with all options",
]


@pytest.mark.parametrize(
    "name", [*(slow(n) if n.endswith("routing_backward") else n for n in TRACED), *map(slow, ALSO_TRACED)]
)
def test_opcheck_traced(name: str) -> None:
    check_traced("auto", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACED)
def test_opcheck_of_the_reference_traced(name: str) -> None:
    check_traced("reference", name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_fakes_have_the_shapes_dtypes_and_strides_of_results(
    impl: str, name: str, dtype: torch.dtype
) -> None:
    """torch.compile relies on them, for inputs in any memory layout."""
    op, *args = op_calls()[name]
    skip_unless_supported(impl, options_of_call(op, args), dtype)

    def cast(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.dtype == torch.bool:
            return x.T.contiguous().T
        # s of the passes is saved in the accumulation dtype
        saved = x.dim() == 4 and not x.requires_grad and "routing_backward" in name
        x = x.detach().to(dtype if dtype == torch.float64 or not saved else torch.float32)
        return x if saved else x.transpose(0, -1).contiguous().transpose(0, -1)

    args = [cast(x) for x in args]
    real = op(*args, impl)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args), impl)
    for r, f in zip(*((x,) if isinstance(x, Tensor) else x for x in (real, fake)), strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def test_couplings_have_no_gradient(impl: str) -> None:
    u, weight = leaf(3, 5, 2), leaf(5, 4, 3, 2)
    c = OPS.couplings(u, weight, None, None, None, 2, False, impl)
    assert not c.requires_grad
    assert torch.equal(c, OPS.couplings(u.detach(), weight.detach(), None, None, None, 2, False, impl))


def penalty_gradients(function: Callable[..., Tensor], inputs: list[Tensor], target: int) -> list[Tensor]:
    """Gradients of value + (‖∂value/∂input‖ − 1)², as in a critic with a gradient penalty."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = function(*leaves).square().sum()
    (first,) = torch.autograd.grad(value, leaves[target], create_graph=True)
    assert first.requires_grad
    return list(torch.autograd.grad(value + (first.norm() - 1) ** 2, leaves, allow_unused=True))


def assert_same_gradients(got: list[Tensor], want: list[Tensor]) -> None:
    for n, (g, w) in enumerate(zip(got, want, strict=True)):
        assert_close(g, w, f"gradient {n}", tolerance=1e-11)


@pytest.mark.parametrize(
    "options", [Options(T, T == 2, detach, T != 1) for T in range(4) for detach in (False, True)], ids=str
)
@pytest.mark.parametrize("target", [0, 1])
def test_gradient_penalty_of_a_layer(impl: str, target: int, options: Options) -> None:
    inputs = [x for x in layer_inputs(SHAPE, options.bias) if x is not None]
    keywords = options.keywords()
    assert_same_gradients(
        penalty_gradients(lambda *x: capsops.capsule_routing(*x, impl=impl, **keywords), inputs, target),
        penalty_gradients(lambda *x: reference.capsule_routing(*x, **keywords), inputs, target),
    )


@pytest.mark.parametrize(
    "options", [Options(T, T == 2, detach, T != 1) for T in range(4) for detach in (False, True)], ids=str
)
def test_gradient_penalty_of_routing(impl: str, options: Options) -> None:
    inputs = [x for x in routing_inputs(SHAPE, options.bias) if x is not None]
    keywords = options.keywords()
    assert_same_gradients(
        penalty_gradients(lambda *x: capsops.dynamic_routing(*x, impl=impl, **keywords), inputs, 0),
        penalty_gradients(lambda *x: reference.dynamic_routing(*x, **keywords), inputs, 0),
    )


@pytest.mark.parametrize("target", [0, 1])
def test_gradient_penalty_of_predictions(impl: str, target: int) -> None:
    inputs = list(layer_inputs(SHAPE)[:2])
    assert_same_gradients(
        penalty_gradients(lambda *x: capsops.predictions(*x, impl=impl), inputs, target),
        penalty_gradients(reference.predictions, inputs, target),
    )


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("where", ["u", "weight", "both"])
def test_gradient_penalty_at_zero(impl: str, where: str, iterations: int) -> None:
    """Dead capsules and zero weights: no NaN from the norm at s = 0."""
    u, weight, bias = layer_inputs(SHAPE, bias=True)
    bias[0] = 0
    if where in ("u", "both"):
        u[0] = 0
    if where in ("weight", "both"):
        weight[:, 0] = 0
    assert_same_gradients(
        penalty_gradients(
            lambda *x: capsops.capsule_routing(*x, iterations=iterations, impl=impl), [u, weight, bias], 0
        ),
        penalty_gradients(
            lambda *x: reference.capsule_routing(*x, iterations=iterations), [u, weight, bias], 0
        ),
    )


def test_gradient_penalty_of_several_layers(impl: str) -> None:
    """Two layers and a squash between them: second derivatives pass through each op's backward."""

    def network(routing: Callable, squash: Callable) -> Callable[..., Tensor]:
        return lambda u, first, second: routing(squash(routing(u, first)), second)

    inputs = [
        torch.randn(2, 5, 3, dtype=torch.float64),
        torch.randn(5, 4, 3, 3, dtype=torch.float64),
        torch.randn(4, 2, 5, 3, dtype=torch.float64),
    ]
    with capsops.use_impl(impl):
        got = penalty_gradients(network(capsops.capsule_routing, capsops.squash), inputs, 0)
    assert_same_gradients(
        got, penalty_gradients(network(reference.capsule_routing, reference.squash), inputs, 0)
    )


@pytest.mark.parametrize("op", ["squash", "predictions", "dynamic_routing", "capsule_routing"])
def test_third_derivatives(impl: str, op: str) -> None:
    inputs = {
        "squash": [torch.randn(3, 4, dtype=torch.float64)],
        "predictions": list(layer_inputs(SHAPE)[:2]),
        "dynamic_routing": list(routing_inputs(SHAPE, bias=True)),
        "capsule_routing": list(layer_inputs(SHAPE, bias=True)),
    }[op]

    def third(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        value = function(*leaves).pow(3).sum()
        for _ in range(2):
            value = sum(x.square().sum() for x in torch.autograd.grad(value, leaves, create_graph=True))
        return list(torch.autograd.grad(value, leaves))

    with capsops.use_impl(impl):
        got = third(getattr(capsops, op))
    assert_same_gradients(got, third(getattr(reference, op)))


def test_saved_sums_have_no_gradient(impl: str) -> None:
    u, weight, _ = layer_inputs(SHAPE)
    v, s = OPS.capsule_routing(u.requires_grad_(), weight, None, None, None, 3, False, False, True, impl)
    assert v.requires_grad
    assert not s.requires_grad
    assert s.shape == (3, 3, 4, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_saved_sums_are_in_the_accumulation_dtype(impl: str, dtype: torch.dtype) -> None:
    inputs = layer_inputs(SHAPE, bias=True, dtype=dtype)
    v, s = OPS.capsule_routing(*inputs, None, None, 2, False, False, True, impl)
    assert v.dtype == dtype
    assert s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(reference.squash(s[-1].double()), v.double(), tolerance=2 * torch.finfo(dtype).eps)


def test_inference_mode_and_no_grad(impl: str) -> None:
    inputs = [x.requires_grad_() for x in layer_inputs(SHAPE, bias=True)]
    want = capsops.capsule_routing(*inputs, impl=impl)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            v = capsops.capsule_routing(*inputs, impl=impl)
        assert not v.requires_grad
        assert torch.equal(v, want)


def test_backward_twice_through_a_retained_graph(impl: str) -> None:
    inputs = [x.requires_grad_() for x in layer_inputs(SHAPE, bias=True)]
    loss = capsops.capsule_routing(*inputs, impl=impl).sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_changing_a_saved_tensor_in_place_is_an_error(impl: str) -> None:
    u, weight, _ = layer_inputs(SHAPE)
    weight.requires_grad_()
    v = capsops.capsule_routing(u, weight, impl=impl)
    u.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        v.sum().backward()


def test_activation_checkpointing(impl: str) -> None:
    inputs = [x.requires_grad_() for x in layer_inputs(SHAPE, bias=True)]

    def loss(*inputs: Tensor) -> Tensor:
        return capsops.capsule_routing(*inputs, impl=impl).square().sum()

    want = torch.autograd.grad(loss(*inputs), inputs)
    got = torch.autograd.grad(torch.utils.checkpoint.checkpoint(loss, *inputs, use_reentrant=False), inputs)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def test_an_op_of_an_unavailable_backend_raises_an_error(change_backend: Callable[..., None]) -> None:
    """A traced graph may name a backend that is not available where it runs."""
    s = torch.randn(2, 3)
    change_backend("reference", unavailable="it was a test")
    with pytest.raises(RuntimeError, match="impl='reference' is not available: it was a test"):
        OPS.squash(s, 1, "reference")


def test_an_op_rejects_tensors_on_a_device_that_its_backend_does_not_support() -> None:
    s = torch.randn(2, 3)
    with pytest.raises((RuntimeError, ValueError), match="^impl='cuda'"):
        OPS.squash(s, 1, "cuda")
    with pytest.raises((RuntimeError, ValueError), match="^impl='cuda'"):
        OPS.squash_backward(s, s, 1, "cuda")
    with pytest.raises(ValueError, match="^impl: got 'gpu', takes one of"):
        OPS.squash(s, 1, "gpu")


@pytest.mark.parametrize(("needs_u", "needs_weight"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("op", "first_flag"), [("predictions", 3), ("capsule_routing", 10)])
def test_gradients_that_are_not_needed_are_not_requested(
    op: str, first_flag: int, needs_u: bool, needs_weight: bool, change_backend: Callable[..., None]
) -> None:
    backward = dispatch.BACKENDS["reference"].functions[f"{op}_backward"]
    requested = []

    def recording(*arguments: Any) -> Any:
        requested.append(arguments[first_flag:])
        return backward(*arguments)

    change_backend("reference", **{f"{op}_backward": recording})
    u, weight, _ = layer_inputs(SHAPE, bias=False)
    u, weight = u.detach().requires_grad_(needs_u), weight.detach().requires_grad_(needs_weight)
    getattr(capsops, op)(u, weight, impl="reference").sum().backward()
    of_logits = () if op == "predictions" else (False,)
    assert requested == [(needs_u, needs_weight, *of_logits)]


@pytest.mark.parametrize("op", ["dynamic_routing", "capsule_routing"])
def test_the_gradient_of_fixed_logits_is_not_requested(op: str, change_backend: Callable[..., None]) -> None:
    backward = dispatch.BACKENDS["reference"].functions[f"{op}_backward"]
    requested = []

    def recording(*arguments: Any) -> Any:
        requested.append(arguments[-1])
        return backward(*arguments)

    change_backend("reference", **{f"{op}_backward": recording})
    u, weight, _ = layer_inputs(SHAPE)
    inputs = (u, weight) if op == "capsule_routing" else (reference.predictions(u, weight),)
    inputs[0].requires_grad_()
    for needed in (False, True):
        logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=needed)
        getattr(capsops, op)(*inputs, logits=logits, impl="reference").sum().backward()
    assert requested == [False, True]


@pytest.mark.parametrize("iterations", [0, 3])
def test_a_gradient_shares_no_memory_with_the_upstream_gradient(impl: str, iterations: int) -> None:
    """Of one input capsule and one output capsule, whose gradient is the upstream one."""
    u_hat = torch.randn(2, 1, 1, 5, requires_grad=True)
    skip_unless_supported(impl, frozenset((UNSQUASHED,)))
    v, _ = OPS.dynamic_routing(u_hat, None, None, None, iterations, False, False, False, impl)
    upstream = torch.randn_like(v)
    (grad,) = torch.autograd.grad(v, u_hat, upstream)
    assert torch.equal(grad.flatten(), upstream.flatten())
    assert grad.data_ptr() != upstream.data_ptr()
