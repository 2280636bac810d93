"""The public functions: each checks its arguments, settles the implementation, and calls the op."""

import torch
from torch import Tensor

from capsops import dispatch, reference, transforms
from capsops import library as _library  # noqa: F401  registers torch.ops.capsops

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_tensors(**tensors: Tensor | None) -> None:
    """All are tensors of one device, and of one dtype unless autocast will give them one."""
    first_name = first = None
    for name, x in tensors.items():
        if x is None and name == "bias":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, takes a torch.Tensor")
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name}: got dtype {x.dtype}, takes float32, bfloat16, float16 or float64")
        if x.layout is not torch.strided:
            raise ValueError(f"{name}: got layout {x.layout}, takes {torch.strided}: a dense tensor")
        if first is None:
            first_name, first = name, x
            continue
        if x.device != first.device:
            raise ValueError(
                f"{name}: got device {x.device}, takes that of {first_name}, which is {first.device}"
            )
        if x.dtype != first.dtype and (
            torch.float64 in (x.dtype, first.dtype)
            or x.is_meta
            or not torch.is_autocast_enabled(x.device.type)
        ):
            raise TypeError(
                f"{name}: got dtype {x.dtype}, takes that of {first_name}, which is {first.dtype}"
            )


def _check_shape(name: str, x: Tensor, axes: str, sizes: tuple[int | None, ...]) -> None:
    """`sizes` holds None where any size will do."""
    if x.dim() != len(sizes) or any(n is not None and n != m for n, m in zip(sizes, x.shape, strict=True)):
        fixed = ", ".join(
            f"{axis} = {n}" for axis, n in zip(axes.split(), sizes, strict=True) if n is not None
        )
        wanted = f"[{', '.join(axes.split())}]" + (f" with {fixed}" if fixed else "")
        raise ValueError(f"{name}: got shape {list(x.shape)}, takes {wanted}")


def _check_int(name: str, value: int) -> None:
    # A tuple: torch 2.6 cannot compile a test against a union.
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {type(value).__name__}, takes an int")


def check_options(iterations: int, **flags: bool) -> None:
    """An error unless `iterations` is an int of 0 or more and every flag a bool."""
    _check_int("iterations", iterations)
    if iterations < 0:
        raise ValueError(f"iterations: got {iterations}, takes 0 (no routing) or more")
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: got {type(flag).__name__}, takes a bool")


def _effective_iterations(iterations: int, out_capsules: int, leaky: bool) -> int:
    """With one output capsule the softmax is 1, whatever the logits, unless an orphan class takes part."""
    return 0 if out_capsules == 1 and not leaky else iterations


def _formula_serves(impl: str, *tensors: Tensor | None) -> bool:
    """Whether the derivatives that are wanted are those of the reference formula, not of an op."""
    if not transforms.active(*tensors):
        return False
    asked = dispatch.asked(impl)
    if asked in ("auto", "reference"):
        return True
    if transforms.differentiates():
        raise ValueError(
            f"impl: got {asked!r}, takes 'auto' or 'reference' in forward-mode differentiation and under"
            " torch.func: kernels have a gradient for autograd's backward mode alone"
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
        TypeError: `s` is not a tensor.
        ValueError: `dim` is out of range, the dtype is not a floating one, or `impl` does not serve the
            device, or names a kernel in forward mode or under torch.func.
        RuntimeError: `impl` is not available here.
    """
    _check_tensors(s=s)
    if s.dim() == 0:
        raise ValueError("s: got a scalar, takes a tensor with at least one dimension")
    _check_int("dim", dim)
    if not -s.dim() <= dim < s.dim():
        raise ValueError(
            f"dim: got {dim}, takes {-s.dim()} to {s.dim() - 1} for a tensor of shape {list(s.shape)}"
        )
    found = dispatch.resolve(impl, s.device.type)
    if _formula_serves(impl, s):
        return transforms.by_formula(reference.squash, s, dim=dim)
    return torch.ops.capsops.squash(s, dim % s.dim(), found)


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
        TypeError: an argument is not a tensor, or dtypes differ.
        ValueError: shapes, dtypes or devices do not fit, or `impl` does not serve the device, or
            names a kernel in forward mode or under torch.func.
        RuntimeError: `impl` is not available here.
    """
    _check_tensors(u=u, weight=weight)
    _check_shape("u", u, "B I K", (None, None, None))
    _check_shape("weight", weight, "I J D K", (u.shape[1], None, None, u.shape[2]))
    found = dispatch.resolve(impl, u.device.type)
    if _formula_serves(impl, u, weight):
        return transforms.by_formula(reference.predictions, u, weight)
    return torch.ops.capsops.predictions(u, weight, found)


def dynamic_routing(
    u_hat: Tensor,
    bias: Tensor | None = None,
    *,
    iterations: int = 3,
    leaky: bool = False,
    detach: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Routing by agreement on given predictions (Sabour, Frosst, Hinton 2017, procedure 1).

    V⁰ = 0; for t = 1…T: c_ij = softmax_j(û_ij · Vᵗ⁻¹_j), s_j = Σ_i c_ij û_ij + β_j, Vᵗ = Vᵗ⁻¹ + squash(s);
    the result is the last squash(s).

    Args:
        u_hat: predictions [B, I, J, D].
        bias: β [J, D], added to s.
        iterations: T, the number of softmax passes; 0 means no routing, every coupling is 1.
        leaky: one more logit, fixed at 0, takes part in the softmax and is dropped: an orphan class.
        detach: the couplings carry no gradient; it flows through û in the last weighted sum only.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        v [B, J, D], output capsules of length below 1.

    Raises:
        TypeError: an argument is not a tensor, dtypes differ, or an option is of another type.
        ValueError: shapes, dtypes, devices or `iterations` do not fit, or `impl` does not serve the device,
            or names a kernel in forward mode or under torch.func.
        RuntimeError: `impl` is not available here.
    """
    _check_tensors(u_hat=u_hat, bias=bias)
    _check_shape("u_hat", u_hat, "B I J D", (None, None, None, None))
    if bias is not None:
        _check_shape("bias", bias, "J D", tuple(u_hat.shape[2:]))
    check_options(iterations, leaky=leaky, detach=detach)
    iterations = _effective_iterations(iterations, u_hat.shape[2], leaky)
    found = dispatch.resolve(impl, u_hat.device.type)
    if _formula_serves(impl, u_hat, bias):
        options = {"iterations": iterations, "leaky": leaky, "detach": detach}
        return transforms.by_formula(reference.dynamic_routing, u_hat, bias, **options)
    return torch.ops.capsops.dynamic_routing(u_hat, bias, iterations, leaky, detach, found)[0]


def _check_layer(u: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _check_tensors(u=u, weight=weight, bias=bias)
    _check_shape("u", u, "B I K", (None, None, None))
    in_capsules, in_dim = u.shape[1:]
    _check_shape("weight", weight, "I J D K", (in_capsules, None, None, in_dim))
    if bias is not None:
        _check_shape("bias", bias, "J D", tuple(weight.shape[1:3]))


def capsule_routing(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    iterations: int = 3,
    leaky: bool = False,
    detach: bool = False,
    impl: str = "auto",
) -> Tensor:
    """A whole capsule layer: dynamic_routing(predictions(u, weight), bias), without storing û.

    The predictions û_ij = W_ij u_i are recomputed in every pass, forward and backward; but by the reference,
    neither they nor the couplings are stored. Formula: see `dynamic_routing`.

    A GPU allocates beside the results: sums over I in parts [P, B, J, D], P as many as fill the device (in
    small batches that can be more than B × I × J numbers); of each pass three numbers for each input capsule;
    the gradients of u and `weight` in parts, where one block does not make the whole sum.

    Args:
        u: input capsules [B, I, K].
        weight: one D × K matrix per pair of capsules [I, J, D, K].
        bias: β [J, D], added to s.
        iterations: T, the number of softmax passes; 0 means no routing, every coupling is 1.
        leaky: one more logit, fixed at 0, takes part in the softmax and is dropped: an orphan class.
        detach: the couplings carry no gradient; it flows through û in the last weighted sum only.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        v [B, J, D], output capsules of length below 1.

    Raises:
        TypeError: an argument is not a tensor, dtypes differ, or an option is of another type.
        ValueError: shapes, dtypes, devices or `iterations` do not fit, or `impl` does not serve the device,
            or names a kernel in forward mode or under torch.func.
        RuntimeError: `impl` is not available here.
    """
    _check_layer(u, weight, bias)
    check_options(iterations, leaky=leaky, detach=detach)
    iterations = _effective_iterations(iterations, weight.shape[1], leaky)
    found = dispatch.resolve(impl, u.device.type)
    if _formula_serves(impl, u, weight, bias):
        options = {"iterations": iterations, "leaky": leaky, "detach": detach}
        return transforms.by_formula(reference.capsule_routing, u, weight, bias, **options)
    return torch.ops.capsops.capsule_routing(u, weight, bias, iterations, leaky, detach, found)[0]


def couplings(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    iterations: int = 3,
    leaky: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Coupling coefficients of the last pass of `capsule_routing`: how much of capsule i goes to capsule j.

    c_ij = softmax_j(û_ij · Vᵀ⁻¹_j); they sum to 1 over j (below 1 with `leaky`). No gradient.

    Args:
        u: input capsules [B, I, K].
        weight: one D × K matrix per pair of capsules [I, J, D, K].
        bias: β [J, D], added to s.
        iterations: T, the number of softmax passes; 0 gives ones.
        leaky: one more logit, fixed at 0, takes part in the softmax and is dropped.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        c [B, I, J].

    Raises:
        TypeError: an argument is not a tensor, dtypes differ, or an option is of another type.
        ValueError: shapes, dtypes, devices or `iterations` do not fit, or `impl` does not serve the device.
        RuntimeError: `impl` is not available here.
    """
    _check_layer(u, weight, bias)
    check_options(iterations, leaky=leaky)
    iterations = _effective_iterations(iterations, weight.shape[1], leaky)
    impl = dispatch.resolve(impl, u.device.type)
    with torch.no_grad():
        return torch.ops.capsops.couplings(u, weight, bias, iterations, leaky, impl)
