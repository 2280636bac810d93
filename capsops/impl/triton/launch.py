"""How kernels are started: dtype, device, precision of float32 products."""

import contextlib

import torch
import triton
from torch import Tensor

# Settled when Triton defines the kernels, by the environment variable TRITON_INTERPRET.
INTERPRETED = triton.knobs.runtime.interpret

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of x the current one, which is where Triton launches.

    Raises:
        ValueError: x has a dtype that these kernels do not serve.
    """
    if x.dtype not in _DTYPES:
        raise ValueError(f"impl='triton' serves float32, bfloat16 and float16, got {x.dtype}")
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def _tf32_allowed() -> bool:
    # Read at every call: the ops are opaque to torch.compile, so that a graph does not fix it. The newer
    # setting answers for both ways to set it; torch before 2.9 has the older alone.
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.backends.cuda.matmul.allow_tf32 if newer is None else newer == "tf32"


def precision(x: Tensor) -> str:
    """`input_precision` of products of float32 tensors: TF32 where torch allows it for its own."""
    return "tf32" if x.dtype == torch.float32 and torch.version.hip is None and _tf32_allowed() else "ieee"


def launch(kernel: triton.JITFunction, programs: int, *args: object, **options: object) -> None:
    """Starts `programs` programs of the kernel on the current stream."""
    kernel[(programs,)](*args, **options)
