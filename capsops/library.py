"""Each op once: schema, kernel, fake, autograd and autocast, registered with torch.library.

The kernels here pay what every implementation would otherwise pay by itself: the checks of all arguments,
contiguity and empty tensors.
The backward ops have gradients of their own, by autograd through the reference formula, at any order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from capsops import checks, dispatch, reference
from capsops.impl import accumulation_dtype

_library = torch.library.Library("capsops", "DEF")

_ROUTING = "Tensor? bias, Tensor? logits, Tensor? mask, int iterations, bool leaky"

_OPTIONS = ("iterations", "leaky", "detach", "squash_output")

_SCHEMAS = {
    "squash": "(Tensor s, int dim, str impl) -> Tensor",
    "squash_backward": "(Tensor grad, Tensor s, int dim, str impl) -> Tensor",
    "predictions": "(Tensor u, Tensor weight, str impl) -> Tensor",
    "predictions_backward": (
        "(Tensor grad, Tensor u, Tensor weight, bool needs_u, bool needs_weight, str impl)"
        " -> (Tensor, Tensor)"
    ),
    "dynamic_routing": (
        f"(Tensor u_hat, {_ROUTING}, bool detach, bool squash_output, str impl) -> (Tensor, Tensor)"
    ),
    "dynamic_routing_backward": (
        "(Tensor grad, Tensor u_hat, Tensor? bias, Tensor s, int iterations, bool leaky, bool detach,"
        " bool squash_output, str impl) -> (Tensor, Tensor)"
    ),
    "capsule_routing": (
        f"(Tensor u, Tensor weight, {_ROUTING}, bool detach, bool squash_output, str impl)"
        " -> (Tensor, Tensor)"
    ),
    "capsule_routing_backward": (
        "(Tensor grad, Tensor u, Tensor weight, Tensor? bias, Tensor s, int iterations, bool leaky,"
        " bool detach, bool squash_output, bool needs_u, bool needs_weight, str impl)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "couplings": f"(Tensor u, Tensor weight, {_ROUTING}, str impl) -> Tensor",
}


def _implementation(
    impl: str, *tensors: Tensor, lengths: Sequence[int] = (), squash_output: bool = True
) -> Any:
    """The module that serves the call; what has no elements is the reference's.

    `impl` was settled when the op was called, except for "auto" on a GPU, or when a graph that holds it was
    traced or exported, on another device or machine perhaps: it is looked at again.
    """
    device = tensors[0].device
    if impl == "auto" and device.type in dispatch.SETTLED_LATE:
        impl = dispatch.serving(device, tensors[0].dtype, lengths, squash_output)
    else:
        impl = dispatch.resolve(impl, device.type)
    for x in tensors:
        if x.numel() == 0:
            impl = "reference"
    return dispatch.module(impl)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _squash(s: Tensor, dim: int, impl: str) -> Tensor:
    checks.squash(s, dim)
    return _implementation(impl, s).squash(s.contiguous(), dim)


def _squash_backward(grad: Tensor, s: Tensor, dim: int, impl: str) -> Tensor:
    checks.squash_backward(grad, s, dim)
    return _implementation(impl, s).squash_backward(grad.contiguous(), s.contiguous(), dim)


def _predictions(u: Tensor, weight: Tensor, impl: str) -> Tensor:
    checks.predictions(u, weight)
    return _implementation(impl, u, weight).predictions(u.contiguous(), weight.contiguous())


def _predictions_backward(
    grad: Tensor, u: Tensor, weight: Tensor, needs_u: bool, needs_weight: bool, impl: str
) -> tuple[Tensor, Tensor]:
    checks.predictions_backward(grad, u, weight)
    serve = _implementation(impl, u, weight)
    return serve.predictions_backward(
        grad.contiguous(), u.contiguous(), weight.contiguous(), needs_u, needs_weight
    )


def _dynamic_routing(
    u_hat: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    checks.dynamic_routing(u_hat, bias, logits, mask, iterations)
    iterations = checks.effective_iterations(iterations, u_hat.shape[2], leaky)
    serve = _implementation(impl, u_hat, lengths=u_hat.shape[3:], squash_output=squash_output)
    return serve.dynamic_routing(u_hat.contiguous(), _contiguous(bias), iterations, leaky, squash_output)


def _dynamic_routing_backward(
    grad: Tensor,
    u_hat: Tensor,
    bias: Tensor | None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    checks.dynamic_routing_backward(grad, u_hat, bias, s, iterations, leaky)
    iterations = checks.effective_iterations(iterations, u_hat.shape[2], leaky)
    serve = _implementation(impl, u_hat, lengths=u_hat.shape[3:], squash_output=squash_output)
    if s.dim() == 3:
        s = s.unflatten(2, u_hat.shape[2:])
    return serve.dynamic_routing_backward(
        grad.contiguous(), u_hat.contiguous(), s.contiguous(), iterations, leaky, detach, squash_output
    )


def _capsule_routing(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    checks.capsule_routing(u, weight, bias, logits, mask, iterations)
    iterations = checks.effective_iterations(iterations, weight.shape[1], leaky)
    serve = _implementation(impl, u, weight, lengths=weight.shape[2:], squash_output=squash_output)
    return serve.capsule_routing(
        u.contiguous(), weight.contiguous(), _contiguous(bias), iterations, leaky, squash_output
    )


def _capsule_routing_backward(
    grad: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    needs_u: bool,
    needs_weight: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.capsule_routing_backward(grad, u, weight, bias, s, iterations, leaky)
    iterations = checks.effective_iterations(iterations, weight.shape[1], leaky)
    serve = _implementation(impl, u, weight, lengths=weight.shape[2:], squash_output=squash_output)
    if s.dim() == 3:
        s = s.unflatten(2, weight.shape[1:3])
    return serve.capsule_routing_backward(
        grad.contiguous(),
        u.contiguous(),
        weight.contiguous(),
        s.contiguous(),
        iterations,
        leaky,
        detach,
        squash_output,
        needs_u,
        needs_weight,
    )


def _couplings(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    impl: str,
) -> Tensor:
    checks.couplings(u, weight, bias, logits, mask, iterations)
    iterations = checks.effective_iterations(iterations, weight.shape[1], leaky)
    serve = _implementation(impl, u, weight, lengths=weight.shape[2:])
    return serve.couplings(u.contiguous(), weight.contiguous(), _contiguous(bias), iterations, leaky)


def _routing_fakes(
    like: Tensor, batch: int, capsules: int, dim: int, iterations: int, leaky: bool
) -> tuple[Tensor, Tensor]:
    v = like.new_empty(batch, capsules, dim)
    passes = checks.saved_passes(iterations, capsules, leaky)
    return v, v.new_empty(passes, batch, capsules, dim, dtype=accumulation_dtype(like.dtype))


def _like(x: Tensor, needed: bool = True) -> Tensor:
    return x.new_empty(x.shape if needed else 0)


def _squash_fake(s: Tensor, dim: int, impl: str) -> Tensor:
    checks.squash(s, dim)
    return _like(s)


def _squash_backward_fake(grad: Tensor, s: Tensor, dim: int, impl: str) -> Tensor:
    checks.squash_backward(grad, s, dim)
    return _like(s)


def _predictions_fake(u: Tensor, weight: Tensor, impl: str) -> Tensor:
    checks.predictions(u, weight)
    return u.new_empty(u.shape[0], *weight.shape[:3])


def _predictions_backward_fake(
    grad: Tensor, u: Tensor, weight: Tensor, needs_u: bool, needs_weight: bool, impl: str
) -> tuple[Tensor, Tensor]:
    checks.predictions_backward(grad, u, weight)
    return _like(u, needs_u), _like(weight, needs_weight)


def _dynamic_routing_fake(
    u_hat: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    checks.dynamic_routing(u_hat, bias, logits, mask, iterations)
    return _routing_fakes(u_hat, u_hat.shape[0], *u_hat.shape[2:], iterations, leaky)


def _dynamic_routing_backward_fake(
    grad: Tensor,
    u_hat: Tensor,
    bias: Tensor | None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    checks.dynamic_routing_backward(grad, u_hat, bias, s, iterations, leaky)
    return _like(u_hat), u_hat.new_empty(u_hat.shape[2:])


def _capsule_routing_fake(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    checks.capsule_routing(u, weight, bias, logits, mask, iterations)
    return _routing_fakes(u, u.shape[0], *weight.shape[1:3], iterations, leaky)


def _capsule_routing_backward_fake(
    grad: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    needs_u: bool,
    needs_weight: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.capsule_routing_backward(grad, u, weight, bias, s, iterations, leaky)
    return _like(u, needs_u), _like(weight, needs_weight), u.new_empty(weight.shape[1:3])


def _couplings_fake(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    impl: str,
) -> Tensor:
    checks.couplings(u, weight, bias, logits, mask, iterations)
    return u.new_empty(u.shape[0], *weight.shape[:2])


_FAKES: dict[str, Callable] = {
    "squash": _squash_fake,
    "squash_backward": _squash_backward_fake,
    "predictions": _predictions_fake,
    "predictions_backward": _predictions_backward_fake,
    "dynamic_routing": _dynamic_routing_fake,
    "dynamic_routing_backward": _dynamic_routing_backward_fake,
    "capsule_routing": _capsule_routing_fake,
    "capsule_routing_backward": _capsule_routing_backward_fake,
    "couplings": _couplings_fake,
}


def _alias(x: Tensor) -> Tensor:
    """A node of its own for x: differentiating with respect to it does not run on into x's history."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def _second_order(
    formula: Callable[..., Tensor],
    inputs: tuple[Tensor | None, ...],
    grad: Tensor,
    grad_grads: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The vector-Jacobian product of (grad, *inputs) ↦ vjp of `formula`, for upstream `grad_grads`.

    `grad_grads` belong to the gradients of `inputs`, None where there is none. Returns the gradient of `grad`
    and of each input (None for an input that is None).
    """
    create_graph = torch.is_grad_enabled()
    wide = accumulation_dtype(grad.dtype)
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        aliases = [None if x is None else _alias(x) for x in inputs]
        upstream = _alias(grad)
        pairs = [
            (n, g.to(wide)) for n, g in enumerate(grad_grads) if aliases[n] is not None and g is not None
        ]
        if not pairs:
            return (None,) * (1 + len(inputs))
        wider = [None if x is None else x.to(wide) for x in aliases]
        firsts = torch.autograd.grad(
            formula(*wider),
            [wider[n] for n, _ in pairs],
            upstream.to(wide),
            create_graph=True,
            materialize_grads=True,
        )
        product = sum((first * g).sum() for first, (_, g) in zip(firsts, pairs, strict=True))
        present = [upstream, *(x for x in aliases if x is not None)]
        found = iter(torch.autograd.grad(product, present, create_graph=create_graph, materialize_grads=True))
        return (next(found), *(None if x is None else next(found) for x in aliases))


def _squash_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    s, ctx.dim, ctx.impl = inputs
    ctx.save_for_backward(s)


def _squash_vjp(ctx: Any, grad: Tensor) -> tuple:
    (s,) = ctx.saved_tensors
    return torch.ops.capsops.squash_backward(grad, s, ctx.dim, ctx.impl), None, None


def _squash_backward_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad, s, ctx.dim, _ = inputs
    ctx.save_for_backward(grad, s)


def _squash_backward_vjp(ctx: Any, grad_grad: Tensor) -> tuple:
    grad, s = ctx.saved_tensors
    found = _second_order(lambda x: reference.squash(x, ctx.dim), (s,), grad, (grad_grad,))
    return *found, None, None


def _predictions_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    u, weight, ctx.impl = inputs
    ctx.save_for_backward(u, weight)


def _predictions_vjp(ctx: Any, grad: Tensor) -> tuple:
    u, weight = ctx.saved_tensors
    needs_u, needs_weight, *_ = ctx.needs_input_grad
    grad_u, grad_weight = torch.ops.capsops.predictions_backward(
        grad, u, weight, needs_u, needs_weight, ctx.impl
    )
    return grad_u if needs_u else None, grad_weight if needs_weight else None, None


def _predictions_backward_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad, u, weight, ctx.needs_u, ctx.needs_weight, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, u, weight)


def _predictions_backward_vjp(ctx: Any, grad_grad_u: Tensor | None, grad_grad_weight: Tensor | None) -> tuple:
    grad, u, weight = ctx.saved_tensors
    grad_grads = (grad_grad_u if ctx.needs_u else None, grad_grad_weight if ctx.needs_weight else None)
    found = _second_order(reference.predictions, (u, weight), grad, grad_grads)
    return *found, None, None, None


def _saved(s: Tensor) -> Tensor:
    """s [T, B, J, D] as it is kept for backward: in a graph that is traced, as [T, B, J · D].

    Behind a convolution, torch 2.6's inductor takes what has four axes for images, puts the second axis last
    in memory, and takes the strides that this gives, which depend on the batch size, for constants.
    """
    return s if type(s) is Tensor else s.flatten(2)


def _dynamic_routing_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    u_hat, bias, _, _, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u_hat, bias, _saved(output[1]))


def _dynamic_routing_vjp(ctx: Any, grad: Tensor | None, _: None) -> tuple:
    if grad is None:
        return (None,) * 9
    u_hat, bias, s = ctx.saved_tensors
    grad_u_hat, grad_bias = torch.ops.capsops.dynamic_routing_backward(grad, u_hat, bias, s, *ctx.options)
    return grad_u_hat, None if bias is None else grad_bias, *(None,) * 7


def _dynamic_routing_backward_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad, u_hat, bias, _, *options, _ = inputs
    ctx.options = dict(zip(_OPTIONS, options, strict=True))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, u_hat, bias)


def _dynamic_routing_backward_vjp(
    ctx: Any, grad_grad_u_hat: Tensor | None, grad_grad_bias: Tensor | None
) -> tuple:
    grad, u_hat, bias = ctx.saved_tensors
    found = _second_order(
        lambda x, b: reference.dynamic_routing(x, b, **ctx.options),
        (u_hat, bias),
        grad,
        (grad_grad_u_hat, grad_grad_bias),
    )
    return *found, *(None,) * 6


def _capsule_routing_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    u, weight, bias, _, _, *ctx.options, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, weight, bias, _saved(output[1]))


def _capsule_routing_vjp(ctx: Any, grad: Tensor | None, _: None) -> tuple:
    if grad is None:
        return (None,) * 10
    u, weight, bias, s = ctx.saved_tensors
    needs_u, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    grad_u, grad_weight, grad_bias = torch.ops.capsops.capsule_routing_backward(
        grad,
        u,
        weight,
        bias,
        s,
        *ctx.options,
        needs_u,
        needs_weight,
        ctx.impl,
    )
    found = (
        grad_u if needs_u else None,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
    )
    return *found, *(None,) * 7


def _capsule_routing_backward_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad, u, weight, bias, _, *options, ctx.needs_u, ctx.needs_weight, _ = inputs
    ctx.options = dict(zip(_OPTIONS, options, strict=True))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, u, weight, bias)


def _capsule_routing_backward_vjp(
    ctx: Any, grad_grad_u: Tensor | None, grad_grad_weight: Tensor | None, grad_grad_bias: Tensor | None
) -> tuple:
    grad, u, weight, bias = ctx.saved_tensors
    found = _second_order(
        lambda x, w, b: reference.capsule_routing(x, w, b, **ctx.options),
        (u, weight, bias),
        grad,
        (
            grad_grad_u if ctx.needs_u else None,
            grad_grad_weight if ctx.needs_weight else None,
            grad_grad_bias,
        ),
    )
    return *found, *(None,) * 8


_GRADIENTS = {
    "squash": (_squash_vjp, _squash_setup),
    "squash_backward": (_squash_backward_vjp, _squash_backward_setup),
    "predictions": (_predictions_vjp, _predictions_setup),
    "predictions_backward": (_predictions_backward_vjp, _predictions_backward_setup),
    "dynamic_routing": (_dynamic_routing_vjp, _dynamic_routing_setup),
    "dynamic_routing_backward": (_dynamic_routing_backward_vjp, _dynamic_routing_backward_setup),
    "capsule_routing": (_capsule_routing_vjp, _capsule_routing_setup),
    "capsule_routing_backward": (_capsule_routing_backward_vjp, _capsule_routing_backward_setup),
}

_KERNELS: dict[str, Callable] = {
    "squash": _squash,
    "squash_backward": _squash_backward,
    "predictions": _predictions,
    "predictions_backward": _predictions_backward,
    "dynamic_routing": _dynamic_routing,
    "dynamic_routing_backward": _dynamic_routing_backward,
    "capsule_routing": _capsule_routing,
    "capsule_routing_backward": _capsule_routing_backward,
    "couplings": _couplings,
}


def autocast_enabled(x: Tensor | None) -> bool:
    """Whether autocast is on for the device of x; torch raises an error for devices that have none."""
    return x is not None and x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def _kernel(function: Callable) -> Callable:
    """The kernel as registered: its results are contiguous, as the fakes say, and autocast stays outside."""

    def call(*args: Any) -> Any:
        if autocast_enabled(args[0]):
            with torch.autocast(args[0].device.type, enabled=False):
                return call(*args)
        results = function(*args)
        if isinstance(results, Tensor):
            return results.contiguous()
        return tuple(x.contiguous() for x in results)

    return call


def _refuse_tangents(name: str, args: tuple) -> None:
    """The ops have no derivative in forward mode: a tangent would be lost.

    Raises:
        ValueError: a tensor carries one.
    """
    for argument, x in zip(getattr(torch.ops.capsops, name).default._schema.arguments, args, strict=True):
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise ValueError(
                f"{argument.name}: got a tensor with a tangent, takes one without:"
                f" torch.ops.capsops.{name} has no derivative in forward mode"
            )


def _below_autograd(name: str) -> Callable:
    """The op itself, its result a constant whatever the arguments require."""
    op = getattr(torch.ops.capsops, name).default
    below = torch._C._after_autograd_keyset

    def call(keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & below, *args)

    return call


def _autograd_kernel(name: str, vjp: Callable[..., tuple], setup: Callable[..., None]) -> Callable:
    """The kernel that records the gradient: `setup` keeps what `vjp` takes.

    What torch.library.register_autograd does, for ops without keyword arguments: it asks the schema for
    defaults and looks into lists of tensors at every call, which costs as long as a small layer computes.
    """
    plain = _below_autograd(name)

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *args, keyset = args
            results = plain(keyset, *args)
            setup(ctx, args, results)
            return results

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple:
            return *vjp(ctx, *grads), None

    Recorded.__name__ = f"capsops_{name}"

    def call(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        if torch.is_grad_enabled():
            for x in args:
                if isinstance(x, Tensor) and x.requires_grad:
                    return Recorded.apply(*args, keyset)
        return plain(keyset, *args)

    return call


def under_autocast(op: Callable, device: str) -> Callable:
    """What torch does for matrix products: every tensor but float64 in autocast's dtype."""

    def cast(x: Any) -> Any:
        wanted = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(torch.get_autocast_dtype(device)) if wanted else x

    def call(*args: Any) -> Any:
        args = tuple(cast(x) for x in args)
        with torch.autocast(device, enabled=False):
            return op(*args)

    return call


for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _kernel(_KERNELS[_name]), "CompositeExplicitAutograd")
    for _key in ("NestedTensorCPU", "NestedTensorCUDA", "NestedTensorMeta"):
        _library.impl(_name, _KERNELS[_name], _key)  # whose first check refuses them
    torch.library.register_fake(f"capsops::{_name}", _FAKES[_name], lib=_library)
    if _name in _GRADIENTS:
        _library.impl(_name, _autograd_kernel(_name, *_GRADIENTS[_name]), "Autograd", with_keyset=True)
_library.impl("couplings", _below_autograd("couplings"), "Autograd", with_keyset=True)
for _name in ("squash", "predictions", "dynamic_routing", "capsule_routing", "couplings"):
    for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _library.impl(_name, under_autocast(getattr(torch.ops.capsops, _name), _device), _key)
