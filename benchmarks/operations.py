"""How many floating-point operations routing without û takes: the fewest for its passes.

One product û = W u is 2·B·I·J·D·K operations; a dot product with, or a sum of multiples of, û_ij costs
2·B·I·J·D. Exponentials, divisions and all that is of the size B·I·J or smaller are not counted.
"""

from benchmarks.cases import RoutingCase
from benchmarks.passes import FORWARD


def routing_operations(case: RoutingCase, passes: str) -> int:
    """Operations of one call, forward or forward and backward with the full gradient.

    - The first forward pass, whose couplings are uniform, and the only one of T = 0, is the product alone.
    - Each of the T − 1 later forward passes is the product, the logits and the sum.
    - Backward, each of the T − 1 reductions is the product, the logits û · V, a = û · ∂s, the sum of ∂b û.
    - The gradient pass is the product; for each later pass again the logits and a, and two terms of ∂û, for
      the first pass one term; then the products of ∂û for ∂u and ∂W.
    """
    per_vector = 2 * case.predictions
    product = per_vector * case.in_dim
    later = max(case.iterations - 1, 0)
    forward = product + later * (product + 2 * per_vector)
    if passes == FORWARD:
        return forward
    reductions = later * (product + 3 * per_vector)
    gradient = product + later * 4 * per_vector + per_vector + 2 * product
    return forward + reductions + gradient
