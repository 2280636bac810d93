"""The ops, a file each: schema, checks, kernel, fake, gradient, second gradient, FLOPs, sharding.

Importing this package registers them under torch.ops.capsops.
"""

from capsops.ops import capsule_routing, couplings, dynamic_routing, predictions, squash
from capsops.ops._eager import is_plain
from capsops.ops._register import decompositions, register_dtensor_shardings

register_dtensor_shardings()  # DTensors may be there already

__all__ = [
    "capsule_routing",
    "couplings",
    "decompositions",
    "dynamic_routing",
    "is_plain",
    "predictions",
    "register_dtensor_shardings",
    "squash",
]
