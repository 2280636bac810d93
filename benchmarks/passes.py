"""What is run and timed: a function forward without a graph, or forward and backward."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FORWARD, FORWARD_BACKWARD = "forward", "forward + backward"
BOTH = (FORWARD, FORWARD_BACKWARD)


def run(
    function: Callable[..., Tensor], passes: str, inputs: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor, ...]:
    """The value and, with the backward pass, the gradients of `inputs` for the upstream gradient `grad`."""
    if passes == FORWARD:
        with torch.no_grad():
            return (function(*inputs),)
    value = function(*inputs)
    return value.detach(), *torch.autograd.grad(value, inputs, grad)
