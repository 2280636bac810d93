"""The ops, a file each: schema, checks, kernel, fake, gradient and second gradient, in this order.

Importing this package registers them under torch.ops.capsops.
"""

from capsops.ops import capsule_routing, couplings, dynamic_routing, predictions, squash
from capsops.ops._register import decompositions

__all__ = ["capsule_routing", "couplings", "decompositions", "dynamic_routing", "predictions", "squash"]
