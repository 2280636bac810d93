"""How kernels are launched: on which device, and with which precision of matrix products."""

import contextlib

import torch
import triton
from torch import Tensor

from capsops.graph_capture import capturing

# Decided when Triton defines the kernels, by the environment variable TRITON_INTERPRET.
INTERPRETED = triton.knobs.runtime.interpret


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of x the current one, which is where Triton launches."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def _tf32_allowed() -> bool:
    # Read at every call: the ops are opaque to torch.compile, so that a graph does not fix it. The newer
    # setting reflects both ways to set it; torch before 2.9 has only the older one.
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.backends.cuda.matmul.allow_tf32 if newer is None else newer == "tf32"


def unit(x: Tensor) -> str:
    """How kernels multiply matrices of x's dtype: "ieee", "tf32" or "bf16"; all sum in float32.

    Float32 follows torch's own setting. Gradients inside a layer leave the range of float16; TF32 represents
    its numbers exactly, and has the range of float32.
    """
    if x.dtype == torch.bfloat16:
        return "bf16"
    tf32 = x.dtype == torch.float16 or _tf32_allowed()
    return "tf32" if tf32 and torch.version.hip is None else "ieee"


def launch(kernel: triton.JITFunction, programs: int, *args: object, **options: object) -> None:
    """Starts `programs` programs of the kernel on the current stream; the first time it is compiled.

    Raises:
        RuntimeError: that failed in the capture of a CUDA graph. Outside a capture errors are Triton's own.
    """
    try:
        kernel[(programs,)](*args, **options)
    except Exception as error:
        if capturing():
            raise RuntimeError(
                "a CUDA graph is being captured, and a Triton kernel of capsops could not be compiled or"
                " started; call capsops.warm_up(function, *args), or the function once, before the capture"
            ) from error
        raise
