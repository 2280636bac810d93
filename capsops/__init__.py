"""capsops: capsule networks without the wall — fused kernels for squash, predictions and dynamic routing."""

from capsops import nn, reference
from capsops.dispatch import use_impl
from capsops.functional import capsule_routing, couplings, dynamic_routing, predictions, squash
from capsops.ops import decompositions
from capsops.warm_up import warm_up

__version__ = "0.1.0"

__all__ = [
    "capsule_routing",
    "couplings",
    "decompositions",
    "dynamic_routing",
    "nn",
    "predictions",
    "reference",
    "squash",
    "use_impl",
    "warm_up",
]
