"""What each op takes: its kernel and its fake ask these functions first, whoever calls the op.

Shapes, dtypes, layouts, devices and ranges are checked, so that no call can make a kernel read or write
outside its tensors. An error names the argument, what it got and what it takes.
"""

import torch
from torch import Tensor

from capsops.impl import accumulation_dtype

MAX_ITERATIONS = 1000

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def effective_iterations(iterations: int, out_capsules: int, leaky: bool) -> int:
    """`iterations`, or 0 where there is one output capsule and no orphan class.

    The softmax of one logit is 1 whatever that logit is, NaN included: nothing is routed.
    """
    return 0 if out_capsules == 1 and not leaky else iterations


def saved_passes(iterations: int, out_capsules: int, leaky: bool) -> int:
    """How many passes leave their s for backward."""
    return max(effective_iterations(iterations, out_capsules, leaky), 1)


def check_dense(name: str, x: Tensor) -> None:
    """x is an ordinary dense tensor of floating-point numbers.

    Raises:
        TypeError: it is no tensor.
        ValueError: it is nested, sparse or of another dtype.
    """
    if not isinstance(x, Tensor):  # an op takes None for a tensor without a default
        raise TypeError(f"{name}: got {type(x).__name__}, takes a torch.Tensor")
    if x.is_nested:
        raise ValueError(f"{name}: got a nested tensor, takes a dense one")
    if x.layout is not torch.strided:
        raise ValueError(f"{name}: got layout {x.layout}, takes {torch.strided}: a dense tensor")
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name}: got dtype {x.dtype}, takes float32, bfloat16, float16 or float64")


def _check_shape(name: str, x: Tensor, axes: str, **sizes: int) -> None:
    """`axes` has a letter for each dimension; `sizes` says how long some of them are."""
    shape = x.shape
    if len(shape) == len(axes):
        for axis, size in sizes.items():
            if shape[axes.index(axis)] != size:
                break
        else:
            return
    wanted = ", ".join(f"{axis} = {size}" for axis, size in sizes.items())
    raise ValueError(
        f"{name}: got shape {list(shape)}, takes [{', '.join(axes)}]" + (f" with {wanted}" if wanted else "")
    )


def _check_like(name: str, x: Tensor, first_name: str, first: Tensor) -> None:
    """x is a dense tensor with the device and dtype of another argument, which has been checked."""
    if x is None or x.is_nested or x.layout is not torch.strided:
        check_dense(name, x)
    if x.device != first.device:
        raise ValueError(
            f"{name}: got device {x.device}, takes that of {first_name}, which is {first.device}"
        )
    if x.dtype != first.dtype:
        check_dense(name, x)
        raise TypeError(f"{name}: got dtype {x.dtype}, takes that of {first_name}, which is {first.dtype}")


def check_iterations(iterations: int) -> None:
    if not 0 <= iterations <= MAX_ITERATIONS:
        raise ValueError(f"iterations: got {iterations}, takes 0 (no routing) to {MAX_ITERATIONS}")


def _check_not_built(logits: Tensor | None, mask: Tensor | None) -> None:
    """The options of the schemas that no implementation serves yet."""
    for name, x in (("logits", logits), ("mask", mask)):
        if x is not None:
            raise ValueError(f"{name}: got a tensor, takes None: no implementation serves `{name}` yet")


def squash(s: Tensor, dim: int) -> None:
    check_dense("s", s)
    if s.dim() == 0:
        raise ValueError("s: got a scalar, takes a tensor with at least one dimension")
    if not 0 <= dim < s.dim():
        raise ValueError(f"dim: got {dim}, takes 0 to {s.dim() - 1} for a tensor of shape {list(s.shape)}")


def squash_backward(grad: Tensor, s: Tensor, dim: int) -> None:
    squash(s, dim)
    _check_like("grad", grad, "s", s)
    if grad.shape != s.shape:
        raise ValueError(f"grad: got shape {list(grad.shape)}, takes that of s, which is {list(s.shape)}")


def predictions(u: Tensor, weight: Tensor) -> None:
    check_dense("u", u)
    _check_like("weight", weight, "u", u)
    _check_shape("weight", weight, "IJDK")
    in_capsules, _, _, in_dim = weight.shape
    _check_shape("u", u, "BIK", I=in_capsules, K=in_dim)


def predictions_backward(grad: Tensor, u: Tensor, weight: Tensor) -> None:
    predictions(u, weight)
    in_capsules, out_capsules, out_dim, _ = weight.shape
    _check_like("grad", grad, "u", u)
    _check_shape("grad", grad, "BIJD", B=u.shape[0], I=in_capsules, J=out_capsules, D=out_dim)


def _check_bias(bias: Tensor | None, name: str, like: Tensor, out_capsules: int, out_dim: int) -> None:
    if bias is not None:
        _check_like("bias", bias, name, like)
        _check_shape("bias", bias, "JD", J=out_capsules, D=out_dim)


def dynamic_routing(
    u_hat: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
) -> None:
    check_dense("u_hat", u_hat)
    _check_shape("u_hat", u_hat, "BIJD")
    _check_bias(bias, "u_hat", u_hat, *u_hat.shape[2:])
    check_iterations(iterations)
    _check_not_built(logits, mask)


def capsule_routing(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
) -> None:
    predictions(u, weight)
    _check_bias(bias, "u", u, *weight.shape[1:3])
    check_iterations(iterations)
    _check_not_built(logits, mask)


def _check_saved(
    grad: Tensor,
    s: Tensor,
    name: str,
    like: Tensor,
    sizes: tuple[int, int, int],
    iterations: int,
    leaky: bool,
) -> None:
    """The upstream gradient [B, J, D], and s of every pass as the forward op returned it."""
    batch, out_capsules, out_dim = sizes
    _check_like("grad", grad, name, like)
    _check_shape("grad", grad, "BJD", B=batch, J=out_capsules, D=out_dim)
    check_dense("s", s)
    wanted = accumulation_dtype(like.dtype)
    if s.dtype != wanted:
        raise TypeError(f"s: got dtype {s.dtype}, takes {wanted}, in which {like.dtype} is summed")
    if s.device != like.device:
        raise ValueError(f"s: got device {s.device}, takes that of {name}, which is {like.device}")
    passes = saved_passes(iterations, out_capsules, leaky)
    _check_shape("s", s, "TBJD", T=passes, B=batch, J=out_capsules, D=out_dim)


def dynamic_routing_backward(
    grad: Tensor, u_hat: Tensor, bias: Tensor | None, s: Tensor, iterations: int, leaky: bool
) -> None:
    dynamic_routing(u_hat, bias, None, None, iterations)
    batch, _, out_capsules, out_dim = u_hat.shape
    _check_saved(grad, s, "u_hat", u_hat, (batch, out_capsules, out_dim), iterations, leaky)


def capsule_routing_backward(
    grad: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, iterations: int, leaky: bool
) -> None:
    capsule_routing(u, weight, bias, None, None, iterations)
    _, out_capsules, out_dim, _ = weight.shape
    _check_saved(grad, s, "u", u, (u.shape[0], out_capsules, out_dim), iterations, leaky)


def couplings(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
) -> None:
    capsule_routing(u, weight, bias, logits, mask, iterations)
