"""The ops by Triton kernels: NVIDIA and AMD GPUs, and CPU tensors where Triton runs its interpreter.

Serves float32, bfloat16 and float16. No atomics: every sum is made in a fixed order, so that a call gives the
same bits every time. Nothing is tuned or synchronised at call time.
"""

from capsops.backends.triton.capsule_routing import capsule_routing, capsule_routing_backward
from capsops.backends.triton.couplings import couplings
from capsops.backends.triton.dynamic_routing import dynamic_routing, dynamic_routing_backward
from capsops.backends.triton.launch import INTERPRETED
from capsops.backends.triton.predictions import predictions, predictions_backward
from capsops.backends.triton.squash import squash, squash_backward

__all__ = [
    "INTERPRETED",
    "capsule_routing",
    "capsule_routing_backward",
    "couplings",
    "dynamic_routing",
    "dynamic_routing_backward",
    "predictions",
    "predictions_backward",
    "squash",
    "squash_backward",
]
