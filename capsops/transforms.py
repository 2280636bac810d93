"""Derivatives that the ops do not have, in forward mode and under torch.func: those of the reference formula.

An op registered with torch.library has a gradient for autograd's backward mode alone. To forward-mode
automatic differentiation it would look like a constant, and torch.func refuses it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from capsops.impl import accumulation_dtype


def active(*tensors: Tensor | None) -> bool:
    """Whether a transform of torch.func is at work, or one of the tensors carries a tangent."""
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def differentiates() -> bool:
    """Whether what is active takes derivatives; torch.func.vmap by itself does not, and the ops serve it."""
    if forward_ad._current_level >= 0:
        return True
    kinds = torch._C._functorch.TransformType
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() in (kinds.Grad, kinds.Jvp) for level in levels)


def by_formula(formula: Callable[..., Tensor], *tensors: Tensor | None, **options: Any) -> Tensor:
    """`formula` of capsops.reference, in the dtypes of the op: autocast's, and summed in float32 at least."""
    dtype, device = tensors[0].dtype, tensors[0].device.type
    if torch.is_autocast_enabled(device):
        if dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            narrow = (None if x is None else x.to(dtype) for x in tensors)
            return by_formula(formula, *narrow, **options)
    wide = accumulation_dtype(dtype)
    return formula(*(None if x is None else x.to(wide) for x in tensors), **options).to(dtype)
