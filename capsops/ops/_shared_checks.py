"""Checks of arguments that several ops share.

Shapes, dtypes, layouts, devices and ranges are checked, so that no call can make a kernel read or write
outside its tensors. An error names the argument, what it got and what it takes. Since every call pays for the
checks, their messages are put together in functions of their own.
"""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from capsops.backends.backend import accumulation_dtype

MAX_ITERATIONS = 1000

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_STRIDED = torch.strided


def effective_iterations(iterations: int, out_capsules: int, leaky: bool, logits: object = None) -> int:
    """`iterations`, or 0 where there is one output capsule, no orphan class and no starting logits.

    The softmax of one logit is always 1, even of NaN: there is nothing to route. Starting logits may close
    the pair.
    """
    return 0 if out_capsules == 1 and not leaky and logits is None else iterations


def saved_passes(iterations: int, out_capsules: int, leaky: bool, logits: object = None) -> int:
    """How many passes save their s for backward."""
    return max(effective_iterations(iterations, out_capsules, leaky, logits), 1)


def check_layout(name: str, x: Tensor) -> None:
    """x is an ordinary dense tensor, of any dtype.

    Raises:
        TypeError: it is no tensor.
        ValueError: it is nested or sparse.
    """
    if not isinstance(x, Tensor):  # torch.ops accepts None in place of a tensor
        raise TypeError(f"{name}: got {type(x).__name__}, takes a torch.Tensor")
    if x.is_nested:
        raise ValueError(f"{name}: got a nested tensor, takes a dense one")
    if x.layout is not _STRIDED:
        raise ValueError(f"{name}: got layout {x.layout}, takes {_STRIDED}: a dense tensor")


def check_dense(name: str, x: Tensor) -> None:
    """x is an ordinary dense tensor of floating-point numbers.

    Raises:
        TypeError: it is no tensor.
        ValueError: it is nested, sparse or of another dtype.
    """
    check_layout(name, x)
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name}: got dtype {x.dtype}, takes float32, bfloat16, float16 or float64")


def check_like(name: str, x: Tensor, first_name: str, first: Tensor) -> None:
    """x is a dense tensor with the device and dtype of another argument, which has been checked."""
    if x is None or x.is_nested or x.layout is not _STRIDED:
        check_dense(name, x)
    if x.dtype is first.dtype and ((x.is_cpu and first.is_cpu) or x.device == first.device):
        return
    check_dense(name, x)
    if x.device != first.device:
        raise ValueError(
            f"{name}: got device {x.device}, takes that of {first_name}, which is {first.device}"
        )
    raise TypeError(f"{name}: got dtype {x.dtype}, takes that of {first_name}, which is {first.dtype}")


def refuse_shape(name: str, x: Tensor, axes: str, *sizes: int | None) -> NoReturn:
    """Raises the error for a shape. `axes` has a letter per dimension; a size is None where any will do."""
    known = ", ".join(f"{axis} = {n}" for axis, n in zip(axes, sizes, strict=False) if n is not None)
    wanted = f"[{', '.join(axes)}]" + (f" with {known}" if known else "")
    raise ValueError(f"{name}: got shape {list(x.shape)}, takes {wanted}")


def check_iterations(iterations: int) -> None:
    if not 0 <= iterations <= MAX_ITERATIONS:
        raise ValueError(f"iterations: got {iterations}, takes 0 (no routing) to {MAX_ITERATIONS}")


def check_logits_shape(logits: Tensor, axes: Sequence[str], sizes: Sequence[int]) -> None:
    """logits can be broadcast to these sizes."""
    fits = logits.dim() <= len(sizes)
    for size, wanted in zip(reversed(logits.shape), reversed(sizes), strict=False):
        fits = fits and (size == wanted or size == 1)
    if not fits:
        known = ", ".join(f"{axis} = {n}" for axis, n in zip(axes, sizes, strict=True))
        raise ValueError(
            f"logits: got shape {list(logits.shape)}, takes a shape that broadcasts to"
            f" [{', '.join(axes)}] with {known}"
        )


def _check_mask(mask: Tensor, name: str, like: Tensor, pairs: tuple[int, int, int]) -> None:
    """mask is a dense tensor of bool [B, I]."""
    check_layout("mask", mask)
    if mask.dtype is not torch.bool:
        raise TypeError(
            f"mask: got dtype {mask.dtype}, takes torch.bool: True where an input capsule is present"
        )
    if mask.device != like.device:
        raise ValueError(f"mask: got device {mask.device}, takes that of {name}, which is {like.device}")
    if mask.shape != pairs[:2]:
        refuse_shape("mask", mask, "BI", *pairs[:2])


def check_routing(
    name: str,
    like: Tensor,
    sizes: tuple[int, int, int, int],
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
) -> None:
    """Checks the arguments that every routing op has beside the capsules; `sizes` are B, I, J and D."""
    if bias is not None:
        check_like("bias", bias, name, like)
        if bias.shape != sizes[2:]:
            refuse_shape("bias", bias, "JD", *sizes[2:])
    check_iterations(iterations)
    if logits is not None:
        check_like("logits", logits, name, like)
        check_logits_shape(logits, "BIJ", sizes[:3])
    if mask is not None:
        _check_mask(mask, name, like, sizes[:3])


def check_saved(
    name: str,
    like: Tensor,
    sizes: Sequence[int],
    grad: Tensor,
    s: Tensor,
    passes: int,
) -> None:
    """The upstream gradient [B, J, D], and s of every pass: as returned, or [T, B, J · D] as it is saved."""
    check_like("grad", grad, name, like)
    if grad.shape != sizes:
        refuse_shape("grad", grad, "BJD", *sizes)
    check_dense("s", s)
    wanted = accumulation_dtype(like.dtype)
    if s.dtype is not wanted:
        raise TypeError(f"s: got dtype {s.dtype}, takes {wanted}, in which {like.dtype} is summed")
    if s.device != like.device:
        raise ValueError(f"s: got device {s.device}, takes that of {name}, which is {like.device}")
    batch, out_capsules, out_dim = sizes
    if s.shape != (passes, batch, out_capsules * out_dim) and s.shape != (passes, *sizes):
        refuse_shape("s", s, "TBJD", passes, *sizes)
