"""How an op, its fake and its gradient are registered with torch.library.

The kernels as registered do what every backend would otherwise have to do: they make tensors contiguous, and
deal with empty ones. The backward ops have gradients of their own, by autograd through the reference formula,
at any order.
"""

import sys
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from capsops import dispatch
from capsops.backends import reference
from capsops.backends.backend import LOGITS, MASK, NO_OPTIONS, SHARED, UNSQUASHED, accumulation_dtype
from capsops.ops._sharding import Shards, register_shardings
from capsops.proofs.order import Shapes

_library = torch.library.Library("capsops", "DEF")
_kernels: dict[str, Callable] = {}
_shardings: dict[str, Callable[..., list[Shards]]] = {}
_shardings_registered = False

# What the schemas of the routing ops have in common, and the names of their options.
ROUTING = "Tensor? bias, Tensor? logits, Tensor? mask, int iterations, bool leaky"
OPTIONS = ("iterations", "leaky", "detach", "squash_output")

_CPU = torch.device("cpu")

_MOST_KINDS = 4096  # of calls that are remembered


class Prepared(NamedTuple):
    """What the arguments of a call tell without the numbers in them, once they have been checked."""

    shapes: Shapes = ()  # of u and W, or of û; empty for squash
    options: frozenset[str] = NO_OPTIONS  # those that a backend may lack
    empty: bool = False  # whether a tensor has no numbers
    iterations: int = 0  # 0 also where there is nothing to route


def routing_options(
    squash_output: bool, logits: Tensor | None, mask: Tensor | None, shared: bool
) -> frozenset[str]:
    """The options of a routing call that a backend may lack."""
    used = {UNSQUASHED: not squash_output, LOGITS: logits is not None, MASK: mask is not None, SHARED: shared}
    return frozenset(option for option, is_used in used.items() if is_used)


def _kind(x: Tensor | None) -> Hashable:
    """All of a tensor that checks look at."""
    if x is None or x.is_nested:  # which has no shape
        return x
    return x.shape, x.dtype, x.device, x.layout


def once_for_each_kind(prepare: Callable[..., Prepared], tensors: int) -> Callable[..., Prepared]:
    """`prepare`, called once for all calls that differ in nothing but the numbers in their tensors.

    So the arguments of every call are checked, and most calls pay for a look-up in a table. The first
    `tensors` arguments are tensors or None.
    """
    table: dict[Hashable, Prepared] = {}

    def prepared(*args: Any) -> Prepared:
        try:
            kind = (*map(_kind, args[:tensors]), *args[tensors:])
            call = table.get(kind)
        except TypeError:  # sizes that are symbols
            return prepare(*args)
        if call is None:
            call = prepare(*args)
            if len(table) >= _MOST_KINDS:
                table.clear()
            table[kind] = call
        return call

    return prepared


def backend_function(op: str, impl: str, first: Tensor, call: Prepared) -> Callable:
    """The function of the backend that computes a call, which is the reference for empty tensors."""
    device = _CPU if first.is_cpu else first.device
    backend = dispatch.chosen(op, impl, device, first.dtype, call.shapes, call.options)
    return (reference.BACKEND if call.empty else backend).functions[op]


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def with_three_axes(logits: Tensor | None) -> Tensor | None:
    """Starting logits as backends take them: [B, I, J], with 1 for an axis along which they are broadcast."""
    return None if logits is None else logits[(None,) * (3 - logits.dim())]


def fake_like(x: Tensor, needed: bool = True) -> Tensor:
    """For a fake: a gradient of x, which has no elements where it is not needed."""
    return x.new_empty(x.shape if needed else 0)


def like_logits(gradient: Tensor, logits: Tensor | None, needed: bool) -> Tensor:
    """∂logits as a backend returns it, with the axes of `logits`; empty where it is not needed."""
    return gradient.view(logits.shape) if needed and logits is not None else gradient


def fake_like_logits(logits: Tensor | None, needed: bool, like: Tensor) -> Tensor:
    return like.new_empty(0) if logits is None else fake_like(logits, needed)


def routing_fakes(like: Tensor, batch: int, capsules: int, dim: int, passes: int) -> tuple[Tensor, Tensor]:
    """For a fake: v, and s of every pass."""
    v = like.new_empty(batch, capsules, dim)
    return v, v.new_empty(passes, batch, capsules, dim, dtype=accumulation_dtype(like.dtype))


def saved(s: Tensor) -> Tensor:
    """s [T, B, J, D] as it is saved for backward: in a traced graph, as [T, B, J · D].

    Behind a convolution, torch 2.6's inductor treats a tensor with four axes as images: it puts the second
    axis last in memory, and treats the resulting strides, which depend on the batch size, as constants.
    """
    return s if type(s) is Tensor else s.flatten(2)


def _alias(x: Tensor) -> Tensor:
    """A new node for x: differentiating with respect to it stops there and leaves out x's history."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def second_order(
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
        wider = [None if x is None else x.to(wide) for x in aliases]
        pairs = [
            (x, g.to(wide)) for x, g in zip(wider, grad_grads, strict=True) if x is not None and g is not None
        ]
        if not pairs:
            return (None,) * (1 + len(inputs))
        firsts = torch.autograd.grad(
            formula(*wider),
            [x for x, _ in pairs],
            upstream.to(wide),
            create_graph=True,
            materialize_grads=True,
        )
        product = torch.stack([(first * g).sum() for first, (_, g) in zip(firsts, pairs, strict=True)]).sum()
        present = [upstream, *(x for x in aliases if x is not None)]
        gradients = iter(
            torch.autograd.grad(product, present, create_graph=create_graph, materialize_grads=True)
        )
        return (next(gradients), *(None if x is None else next(gradients) for x in aliases))


def autocast_enabled(x: Tensor | None) -> bool:
    """Whether autocast is on for the device of x; torch raises an error for devices that have none.

    torch.ops accepts None in place of a tensor, which the checks reject later.
    """
    return x is not None and x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def _without_autocast(kernel: Callable) -> Callable:
    """The kernel, with autocast off inside it."""

    def call(*args: Any) -> Any:
        if autocast_enabled(args[0]):
            with torch.autocast(args[0].device.type, enabled=False):
                return kernel(*args)
        return kernel(*args)

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
    """Calls the op without recording a gradient."""
    op = getattr(torch.ops.capsops, name).default
    below = torch._C._after_autograd_keyset

    def call(keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & below, *args)

    return call


def _function(name: str, forward: Callable, backward: Callable) -> type[torch.autograd.Function]:
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    bases = (torch.autograd.Function,)
    return types.new_class(f"capsops_{name}", bases, exec_body=lambda body: body.update(methods))


def _records(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd has to record a call."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def _tensors(name: str) -> slice:
    """The arguments of an op that are tensors or may be: its first ones."""
    kinds = [str(argument.type) for argument in getattr(torch.ops.capsops, name).default._schema.arguments]
    count = sum("Tensor" in kind for kind in kinds)
    if not all("Tensor" in kind for kind in kinds[:count]):
        raise ValueError(f"the schema of {name} has to begin with its tensors, got {kinds}")
    return slice(count)


def _autograd_kernel(name: str, vjp: Callable[..., tuple], setup: Callable[..., None]) -> Callable:
    """The kernel for the Autograd key: records the op, for which `setup` saves what `vjp` takes.

    It does what torch.library.register_autograd does, for ops without keyword arguments. That function looks
    up defaults in the schema and searches lists for tensors at every call, which takes as long as a small
    layer needs to compute.
    """
    below_autograd, tensors = _below_autograd(name), _tensors(name)

    def forward(ctx: Any, *all_args: Any) -> Any:
        *args, keyset = all_args
        results = below_autograd(keyset, *args)
        setup(ctx, args, results)
        return results

    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        return *vjp(ctx, *grads), None

    function = _function(name, forward, backward)

    def call(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        return function.apply(*args, keyset) if _records(args[tensors]) else below_autograd(keyset, *args)

    return call


def _eager_call(
    name: str,
    kernel: Callable,
    gradient: tuple[Callable[..., tuple], Callable[..., None]] | None,
    value_only: bool,
) -> Callable:
    """The op for callers in Python: through torch's dispatcher only where it has something to do."""
    op, tensors = getattr(torch.ops.capsops, name).default, _tensors(name)
    apply = None
    if gradient is not None:
        vjp, setup = gradient

        def forward(ctx: Any, *args: Any) -> Any:
            results = kernel(*args)
            setup(ctx, args, results)
            return results[0] if value_only else results

        function = _function(name, forward, vjp)
        # Function's own apply() looks for torch.func's transforms, of which none is active in a plain call.
        apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def call(plain: bool, *args: Any) -> Any:
        if plain and apply is not None and _records(args[tensors]):
            return apply(*args)
        results = kernel(*args) if plain else op(*args)
        return results[0] if value_only else results

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


def register(
    name: str,
    schema: str,
    kernel: Callable,
    fake: Callable,
    gradient: tuple[Callable[..., tuple], Callable[..., None]] | None = None,
    flops: Callable[..., int] | None = None,
    shards: Callable[..., list[Shards]] | None = None,
    *,
    autocast: bool = False,
    value_only: bool = False,
) -> Callable:
    """Defines torch.ops.capsops.<name>.

    Returns the op as the package calls it: with is_plain() of its tensors, and then its arguments.

    Args:
        name: of the op.
        schema: its arguments and results, in torch's language.
        kernel: computes it, after its checks.
        fake: makes empty results of the right shapes, after the same checks.
        gradient: the vector-Jacobian product, and the function that saves its inputs; without it results are
            constants.
        flops: operations of a call, from the shapes of its tensors and its other arguments.
        shards: how the work may be divided, from the op's arguments; see capsops/ops/_sharding.py.
        autocast: whether the op takes part in autocast.
        value_only: whether the package gets the first result only, and the others are for the gradient.
    """
    _kernels[name] = kernel
    if shards is not None:
        _shardings[name] = shards
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, _without_autocast(kernel), "CompositeExplicitAutograd")
    for key in ("NestedTensorCPU", "NestedTensorCUDA", "NestedTensorMeta"):
        _library.impl(name, kernel, key)  # whose first check refuses them
    torch.library.register_fake(f"capsops::{name}", fake, lib=_library)
    autograd = _below_autograd(name) if gradient is None else _autograd_kernel(name, *gradient)
    _library.impl(name, autograd, "Autograd", with_keyset=True)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.capsops, name))(flops)
    if autocast:
        for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            _library.impl(name, under_autocast(getattr(torch.ops.capsops, name), device), key)
    return _eager_call(name, kernel, gradient, value_only)


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """Every op of capsops as plain torch operations: for `ExportedProgram.run_decompositions`.

    A decomposed program no longer needs capsops, and it stores û.

        plain = torch.export.export(model, inputs).run_decompositions(
            torch.export.default_decompositions() | capsops.decompositions()
        )
    """

    def plain(kernel: Callable) -> Callable:
        return lambda *args: kernel(*args[:-1], "reference")  # in the place of `impl`

    return {getattr(torch.ops.capsops, name).default: plain(kernel) for name, kernel in _kernels.items()}


def register_dtensor_shardings() -> None:
    """Registers the shardings once something has imported torch.distributed.tensor.

    Called where a tensor is of a subclass: it may be the first DTensor.
    """
    global _shardings_registered
    if not _shardings_registered and "torch.distributed.tensor" in sys.modules:
        register_shardings(_shardings)
        _shardings_registered = True
