"""Several copies of a case's inputs, so that a device's last-level cache does not keep them between calls."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from capsops.measuring.cases import Case


def input_sets(case: Case, device: torch.device) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    """Copies of a case's inputs, so many that one round of them is twice the device's last-level cache."""
    inputs, grad = case.inputs(device)
    size = sum(x.nbytes for x in (*inputs, grad))
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    copies = min(max(-(-2 * cache // size), 2), 16)
    return [(tuple(x.detach().clone().requires_grad_() for x in inputs), grad.clone()) for _ in range(copies)]


def call_each(call: Callable[..., object], sets: Sequence[tuple]) -> None:
    """One call for each set of inputs."""
    for inputs, grad in sets:
        call(inputs, grad)
