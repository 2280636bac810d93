"""Forward-mode derivatives and those of torch.func, which the ops do not have: by the reference formula.

The gradient of an op registered with torch.library is for autograd's backward mode. In forward mode the op
would count as a constant, and torch.func refuses it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from capsops.backends.backend import accumulation_dtype
from capsops.ops._register import autocast_enabled, under_autocast


def active(*tensors: Tensor | None) -> bool:
    """Whether a transform of torch.func is active, or one of the tensors carries a tangent."""
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def differentiates() -> bool:
    """Whether an active transform takes derivatives. torch.func.vmap does not, and the ops support it."""
    if forward_ad._current_level >= 0:
        return True
    kinds = torch._C._functorch.TransformType
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() in (kinds.Grad, kinds.Jvp) for level in levels)


def by_formula(
    check: Callable[..., None],
    formula: Callable[..., Tensor],
    first: Tensor,
    *others: Tensor | None,
    **options: Any,
) -> Tensor:
    """`formula` of capsops.reference, in the dtypes of the op: autocast's, and summed in float32 at least.

    `check` checks the tensors as the op does.
    """
    if autocast_enabled(first):
        cast = under_autocast(partial(by_formula, check, formula, **options), first.device.type)
        return cast(first, *others)
    check(first, *others)
    wide = accumulation_dtype(first.dtype)
    tensors = (x.to(wide) if x is not None and x.is_floating_point() else x for x in (first, *others))
    return formula(*tensors, **options).to(first.dtype)
