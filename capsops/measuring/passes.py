"""What is run and timed: a function forward, forward with its gradient recorded, or forward and backward."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FORWARD, RECORDED, FORWARD_BACKWARD = "forward", "forward, gradient recorded", "forward + backward"
BOTH = (FORWARD, FORWARD_BACKWARD)


def run(
    function: Callable[..., Tensor], passes: str, inputs: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor, ...]:
    """The value and, with the backward pass, the gradients of `inputs` for the upstream gradient `grad`."""
    if passes == FORWARD:
        with torch.no_grad():
            return (function(*inputs),)
    value = function(*inputs)
    if passes == RECORDED:
        return (value.detach(),)
    return value.detach(), *torch.autograd.grad(value, inputs, grad)
