"""How kernels are started: dtype, device, unit that multiplies matrices."""

import contextlib

import numpy as np
import torch
import triton
from torch import Tensor

# Settled when Triton defines the kernels, by the environment variable TRITON_INTERPRET.
INTERPRETED = triton.knobs.runtime.interpret


def why_interpreter_fails(triton_version: str, numpy_version: str) -> str:
    """Why Triton's interpreter cannot run the kernels, or nothing where it can."""
    older, newer = ([int(n) for n in x.split(".")[:2]] for x in (triton_version, numpy_version))
    if older < [3, 7] and newer >= [2, 4]:
        return (
            f"the interpreter of Triton {triton_version} fails with NumPy 2.4 and newer, got {numpy_version};"
            " run: pip install 'numpy<2.4', or take Triton 3.7 or newer"
        )
    return ""


INTERPRETER_FAILS = why_interpreter_fails(triton.__version__, np.__version__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of x the current one, which is where Triton launches.

    Raises:
        ValueError: x has a dtype that these kernels do not serve.
        RuntimeError: Triton's interpreter is on, and fails with the NumPy that is installed.
    """
    if INTERPRETED and INTERPRETER_FAILS:
        raise RuntimeError(f"impl='triton' is not available: {INTERPRETER_FAILS}")
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


def unit(x: Tensor) -> str:
    """What kernels multiply matrices of x's dtype by: "ieee", "tf32" or "bf16"; all sum in float32.

    Float32 follows torch's own setting. Gradients inside a layer leave the range of float16; TF32 holds its
    numbers exactly, and has the range of float32.
    """
    if x.dtype == torch.bfloat16:
        return "bf16"
    tf32 = x.dtype == torch.float16 or _tf32_allowed()
    return "tf32" if tf32 and torch.version.hip is None else "ieee"


def launch(kernel: triton.JITFunction, programs: int, *args: object, **options: object) -> None:
    """Starts `programs` programs of the kernel on the current stream."""
    kernel[(programs,)](*args, **options)
