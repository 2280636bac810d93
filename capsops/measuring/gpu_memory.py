"""The memory that a call takes on a GPU, by torch's allocator."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def memory_of(call: Callable[[], Sequence[Tensor]], device: torch.device) -> int:
    """Bytes at the peak of a call beyond those before it, less the gradients that it returns."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = call()
    return torch.cuda.max_memory_allocated(device) - before - sum(x.nbytes for x in results[1:])
