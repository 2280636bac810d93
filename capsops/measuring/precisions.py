"""The modes in which kernels for GPUs are checked and timed: a dtype, and whether TF32 is allowed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = {
    "float32": (torch.float32, False),
    "float32, TF32 allowed": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}


@contextmanager
def matrix_precision(tf32: bool) -> Iterator[None]:
    """Whether torch, and so capsops, may use TF32 in matrix products of float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
