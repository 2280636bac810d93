"""The public functions. Each calls an op of torch.ops.capsops, which checks its arguments.

Checked here is only what an op cannot check: whether an argument is a tensor, an int or a bool at all.
Objects with a __torch_function__, such as the proxies of torch.fx, are handed to it first.
"""

from functools import partial
from numbers import Integral

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from capsops import dispatch, ops, reference, transforms
from capsops.ops._shared_checks import check_dense, check_iterations


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, takes a torch.Tensor")
    if x.is_nested:  # torch would look for a kernel for nested tensors
        check_dense(name, x)
    if type(x) is not Tensor and not torch.compiler.is_compiling():
        ops.register_dtensor_shardings()


def _check_tensors(required: dict[str, object], **optional: object) -> None:
    for name, x in required.items():
        _check_tensor(name, x)
    for name, x in optional.items():
        if x is not None:
            _check_tensor(name, x)


def as_int(name: str, value: int) -> int:
    """The value as an op takes it; integers of other libraries, such as NumPy, count as int.

    Raises:
        TypeError: it is a bool or no integer.
        ValueError: it has more than 64 bits.
    """
    if type(value) is not int:
        if isinstance(value, torch.SymInt):
            return value
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}: got {type(value).__name__}, takes an int")
        value = int(value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: got {value}, takes an int of 64 bits")
    return value


def as_iterations(value: int) -> int:
    """The number of iterations as the ops take it.

    Raises:
        TypeError: it is no integer.
        ValueError: it is negative or above 1000.
    """
    iterations = as_int("iterations", value)
    check_iterations(iterations)
    return iterations


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        of = "" if type(value).__module__ == "builtins" else f"{type(value).__module__}."
        raise TypeError(f"{name}: got {of}{type(value).__name__}, takes a bool")


def _check_flags(leaky: bool, detach: bool, squash_output: bool) -> None:
    if not (isinstance(leaky, bool) and isinstance(detach, bool) and isinstance(squash_output, bool)):
        check_flag("leaky", leaky)
        check_flag("detach", detach)
        check_flag("squash_output", squash_output)


def _requested(impl: str, x: Tensor) -> str:
    """What the caller asks for, by `impl`, use_impl() or CAPSOPS_IMPL."""
    impl = dispatch.asked(impl)
    return impl if impl == "auto" else dispatch.requested(impl, x.device.type)


def _exports_to_onnx() -> bool:
    """Whether torch.onnx.export traces the call: ONNX knows the formula, and no op of ours."""
    tracing = torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
    return tracing and torch.onnx.is_in_onnx_export()


def _formula_serves(impl: str, *tensors: Tensor | None) -> bool:
    """Whether what is wanted is the reference formula, not an op: under torch.func, or for ONNX."""
    if _exports_to_onnx():
        return True
    if not transforms.active(*tensors):
        return False
    if impl in ("auto", "reference"):
        return True
    if transforms.differentiates():
        raise ValueError(
            f"impl: got {impl!r}, takes 'auto' or 'reference' in forward-mode differentiation and under"
            " torch.func: kernels have a gradient only in autograd's backward mode"
        )
    return False


def squash(s: Tensor, dim: int = -1, *, impl: str = "auto") -> Tensor:
    """Shrinks vectors to a length below 1: s · ‖s‖ / (1 + ‖s‖²), the norm taken along `dim`.

    Value and Jacobian are 0 at s = 0 and finite for every finite s (Sabour, Frosst, Hinton 2017, equation 1).

    Args:
        s: vectors, of any shape with at least one dimension.
        dim: the dimension along which a vector lies.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        A tensor of the shape and dtype of `s`.

    Raises:
        TypeError: `s` is not a tensor, `dim` not an int, or `impl` not a str.
        ValueError: `dim` is out of range, the dtype is not a floating one, or `impl` does not take tensors of
            this device or dtype, or names a kernel in forward mode or under torch.func.
        RuntimeError: `impl` is not available here.
    """
    if has_torch_function_unary(s):
        return handle_torch_function(squash, (s,), s, dim, impl=impl)
    _check_tensor("s", s)
    dim = as_int("dim", dim)
    axes = s.dim()
    if axes:  # the op raises the error for a scalar
        if not -axes <= dim < axes:
            raise ValueError(
                f"dim: got {dim}, takes {-axes} to {axes - 1} for a tensor of shape {list(s.shape)}"
            )
        dim %= axes
    impl = _requested(impl, s)
    plain = ops.is_plain(s)
    if not plain and _formula_serves(impl, s):
        return transforms.by_formula(lambda s: ops.squash.check(s, dim), reference.squash, s, dim=dim)
    return ops.squash.call(plain, s, dim, impl)


def predictions(u: Tensor, weight: Tensor, *, impl: str = "auto") -> Tensor:
    """Predictions of every input capsule for every output capsule: û_ij = W_ij u_i.

    (Sabour, Frosst, Hinton 2017, equation 2.) The result is the largest tensor of a capsule layer;
    `capsule_routing` does without it.

    Args:
        u: input capsules [B, I, K].
        weight: one D × K matrix per pair of capsules [I, J, D, K].
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        û [B, I, J, D].

    Raises:
        TypeError: an argument is not a tensor, dtypes differ, or `impl` is not a str.
        ValueError: shapes, dtypes or devices do not fit, or `impl` does not take tensors of this device or
            dtype, or names a kernel in forward mode or under torch.func.
        RuntimeError: `impl` is not available here.
    """
    if has_torch_function((u, weight)):
        return handle_torch_function(predictions, (u, weight), u, weight, impl=impl)
    plain = ops.is_plain(u, weight)
    if not plain:
        _check_tensors({"u": u, "weight": weight})
    impl = _requested(impl, u)
    if not plain and _formula_serves(impl, u, weight):
        return transforms.by_formula(ops.predictions.check, reference.predictions, u, weight)
    return ops.predictions.call(plain, u, weight, impl)


def dynamic_routing(
    u_hat: Tensor,
    bias: Tensor | None = None,
    *,
    logits: Tensor | None = None,
    mask: Tensor | None = None,
    iterations: int = 3,
    leaky: bool = False,
    detach: bool = False,
    squash_output: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Routing by agreement of precomputed predictions (Sabour, Frosst, Hinton 2017, procedure 1).

    V⁰ = 0; for t = 1…T: c_ij = softmax_j(ℓ_ij + û_ij · Vᵗ⁻¹_j), s_j = Σ_i c_ij û_ij + β_j,
    Vᵗ = Vᵗ⁻¹ + squash(s); the result is the last squash(s).

    Args:
        u_hat: predictions [B, I, J, D], or [B, I, D] where an input capsule predicts the same for every
            output capsule. J is then that of `logits`, or else of `bias`.
        bias: β [J, D], added to s.
        logits: ℓ, the routing logits of the first pass (the paper's log prior probabilities), broadcast to
            [B, I, J]; those of a sample by itself are [B, 1, J]. −inf closes a pair of capsules: its coupling
            and every gradient through it are 0, for finite û. An input capsule whose pairs are all closed
            contributes nothing; an output capsule whose pairs are all closed is squash(β). +inf and NaN give
            NaN.
        mask: bool [B, I], not broadcast; False marks an input capsule as absent, such as the padding of a
            sequence. Its u (or û) is ignored, even NaN, and has gradient 0; its `logits` must not be NaN.
        iterations: T, the number of softmax passes, 0 to 1000; 0 means no routing, every coupling is 1.
        leaky: one more logit, fixed at 0, takes part in the softmax and is dropped: an orphan class.
        detach: û gets a gradient only through the last weighted sum, `logits` only through the last softmax.
        squash_output: whether the result is squash(s); else it is s itself, for another non-linearity.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        v [B, J, D], output capsules of length below 1, or s [B, J, D].

    Raises:
        TypeError: an argument is not a tensor, dtypes differ, `mask` is not of bool, or an option is of
            another type.
        ValueError: shapes, dtypes, devices or `iterations` do not fit; `impl` does not support this device,
            dtype or option, or names a kernel in forward mode or under torch.func.
        RuntimeError: `impl` is not available here.
    """
    if has_torch_function((u_hat, bias, logits, mask)):
        return handle_torch_function(
            dynamic_routing,
            (u_hat, bias, logits, mask),
            u_hat,
            bias,
            logits=logits,
            mask=mask,
            iterations=iterations,
            leaky=leaky,
            detach=detach,
            squash_output=squash_output,
            impl=impl,
        )
    plain = ops.is_plain(u_hat, bias, logits, mask)
    if not plain:
        _check_tensors({"u_hat": u_hat}, bias=bias, logits=logits, mask=mask)
    iterations = as_int("iterations", iterations)
    _check_flags(leaky, detach, squash_output)
    impl = _requested(impl, u_hat)
    if not plain and _formula_serves(impl, u_hat, bias, logits):
        return transforms.by_formula(
            partial(ops.dynamic_routing.check, iterations=iterations),
            lambda u_hat, bias, logits, mask: reference.dynamic_routing(
                u_hat,
                bias,
                logits=logits,
                mask=mask,
                iterations=iterations,
                leaky=leaky,
                detach=detach,
                squash_output=squash_output,
            ),
            u_hat,
            bias,
            logits,
            mask,
        )
    return ops.dynamic_routing.call(
        plain, u_hat, bias, logits, mask, iterations, leaky, detach, squash_output, impl
    )


def capsule_routing(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logits: Tensor | None = None,
    mask: Tensor | None = None,
    iterations: int = 3,
    leaky: bool = False,
    detach: bool = False,
    squash_output: bool = True,
    impl: str = "auto",
) -> Tensor:
    """A whole capsule layer: dynamic_routing(predictions(u, weight), bias), without storing û.

    The kernels recompute the predictions û_ij = W_ij u_i in every pass, forward and backward. There is one
    exception: on a CPU, batches smaller than K may keep û in scratch memory of the size of a cache, at most
    4 MiB per thread. The reference stores û and the couplings.

    With a weight that all input capsules share, û_ij = W_j u_i is never formed, even in part: the logits are
    u_i · (W_jᵀ V_j), and Σ_i c_ij û_ij is W_j (Σ_i c_ij u_i). (`predictions` takes such a weight expanded, as
    in weight.expand(I, -1, -1, -1).)

    Beside the results, a GPU needs memory for partial sums over I, [P, B, J, D] or, with a shared weight,
    [P, B, J, K], where P is large enough to fill the device (in small batches that can be more than
    B × I × J numbers); for three numbers per input capsule and pass; and for partial gradients of u, `weight`
    and `logits` where no single block computes the whole sum.

    Args:
        u: input capsules [B, I, K].
        weight: one D × K matrix per pair of capsules [I, J, D, K], or one per output capsule, shared by all
            input capsules, [J, D, K] or [1, J, D, K].
        bias: β [J, D], added to s.
        logits: ℓ, the routing logits of the first pass (the paper's log prior probabilities), broadcast to
            [B, I, J]; those of a sample by itself are [B, 1, J]. −inf closes a pair of capsules: its coupling
            and every gradient through it are 0, for finite û. An input capsule whose pairs are all closed
            contributes nothing; an output capsule whose pairs are all closed is squash(β). +inf and NaN give
            NaN.
        mask: bool [B, I], not broadcast; False marks an input capsule as absent, such as the padding of a
            sequence. Its u (or û) is ignored, even NaN, and has gradient 0; its `logits` must not be NaN.
        iterations: T, the number of softmax passes, 0 to 1000; 0 means no routing, every coupling is 1.
        leaky: one more logit, fixed at 0, takes part in the softmax and is dropped: an orphan class.
        detach: û gets a gradient only through the last weighted sum, `logits` only through the last softmax.
        squash_output: whether the result is squash(s); else it is s itself, for another non-linearity.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        v [B, J, D], output capsules of length below 1, or s [B, J, D].

    Raises:
        TypeError: an argument is not a tensor, dtypes differ, `mask` is not of bool, or an option is of
            another type.
        ValueError: shapes, dtypes, devices or `iterations` do not fit; `impl` does not support this device,
            dtype or option, or names a kernel in forward mode or under torch.func.
        RuntimeError: `impl` is not available here.
    """
    if has_torch_function((u, weight, bias, logits, mask)):
        return handle_torch_function(
            capsule_routing,
            (u, weight, bias, logits, mask),
            u,
            weight,
            bias,
            logits=logits,
            mask=mask,
            iterations=iterations,
            leaky=leaky,
            detach=detach,
            squash_output=squash_output,
            impl=impl,
        )
    plain = ops.is_plain(u, weight, bias, logits, mask)
    if not plain:
        _check_tensors({"u": u, "weight": weight}, bias=bias, logits=logits, mask=mask)
    iterations = as_int("iterations", iterations)
    _check_flags(leaky, detach, squash_output)
    impl = _requested(impl, u)
    if not plain and _formula_serves(impl, u, weight, bias, logits):
        return transforms.by_formula(
            partial(ops.capsule_routing.check, iterations=iterations),
            lambda u, weight, bias, logits, mask: reference.capsule_routing(
                u,
                weight,
                bias,
                logits=logits,
                mask=mask,
                iterations=iterations,
                leaky=leaky,
                detach=detach,
                squash_output=squash_output,
            ),
            u,
            weight,
            bias,
            logits,
            mask,
        )
    return ops.capsule_routing.call(
        plain, u, weight, bias, logits, mask, iterations, leaky, detach, squash_output, impl
    )


def couplings(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logits: Tensor | None = None,
    mask: Tensor | None = None,
    iterations: int = 3,
    leaky: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Coupling coefficients of the last pass of `capsule_routing`: how much of capsule i goes to capsule j.

    c_ij = softmax_j(ℓ_ij + û_ij · Vᵀ⁻¹_j); they sum to 1 over j (below 1 with `leaky`). No gradient. Without
    `logits`, those of the first pass are all equal, and those of a single output capsule without `leaky` are
    1, even where û is NaN. Those of closed pairs and of absent input capsules are 0.

    Args:
        u: input capsules [B, I, K].
        weight: one D × K matrix per pair of capsules [I, J, D, K], or one per output capsule, shared by all
            input capsules, [J, D, K] or [1, J, D, K].
        bias: β [J, D], added to s.
        logits: ℓ, the routing logits of the first pass, broadcast to [B, I, J]; −inf closes a pair.
        mask: bool [B, I]; False marks an input capsule as absent.
        iterations: T, the number of softmax passes, 0 to 1000; 0 gives 1 for every open pair.
        leaky: one more logit, fixed at 0, takes part in the softmax and is dropped.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        c [B, I, J].

    Raises:
        TypeError: an argument is not a tensor, dtypes differ, `mask` is not of bool, or an option is of
            another type.
        ValueError: shapes, dtypes, devices or `iterations` do not fit, or `impl` does not support this
            device, dtype or option.
        RuntimeError: `impl` is not available here.
    """
    if has_torch_function((u, weight, bias, logits, mask)):
        return handle_torch_function(
            couplings,
            (u, weight, bias, logits, mask),
            u,
            weight,
            bias,
            logits=logits,
            mask=mask,
            iterations=iterations,
            leaky=leaky,
            impl=impl,
        )
    plain = ops.is_plain(u, weight, bias, logits, mask)
    if not plain:
        _check_tensors({"u": u, "weight": weight}, bias=bias, logits=logits, mask=mask)
    iterations = as_int("iterations", iterations)
    check_flag("leaky", leaky)
    impl = _requested(impl, u)
    if not plain and _exports_to_onnx():
        return transforms.by_formula(
            partial(ops.couplings.check, iterations=iterations),
            lambda u, weight, bias, logits, mask: reference.couplings(
                u, weight, bias, logits=logits, mask=mask, iterations=iterations, leaky=leaky
            ),
            u,
            weight,
            bias,
            logits,
            mask,
        )
    with torch.no_grad():
        return ops.couplings.call(plain, u, weight, bias, logits, mask, iterations, leaky, impl)
