"""How many operations routing without û takes: the fewest for its passes.

One product û = W u is 2·B·I·J·D·K operations; a dot product with, or a sum of multiples of, û_ij costs
2·B·I·J·D. Divisions and all that is of the size B·I·J or smaller are not counted, exponentials by themselves.
"""

from typing import NamedTuple

from capsops.measuring.cases import Case
from capsops.measuring.passes import FORWARD


class Operations(NamedTuple):
    """What a call computes: operations of products û, ∂u and ∂W, of sums and dot products; exponentials."""

    products: int
    sums: int
    exponentials: int

    @property
    def flops(self) -> int:
        return self.products + self.sums


def operations(case: Case, passes: str) -> Operations:
    """Of one call, forward or forward and backward with the full gradient.

    - The first forward pass, whose couplings are uniform, and the only one of T = 0, is the product.
    - Each of the T − 1 later forward passes is the product, the logits and the sum.
    - Backward, each of the T − 1 reductions is the product, the logits û · V, a = û · ∂s, the sum of ∂b û.
    - The gradient pass is the product; for each later pass again the logits and a, and two terms of ∂û, for
      the first pass one term; then the products of ∂û for ∂u and ∂W.
    """
    later = max(case.iterations - 1, 0)
    products, sums, softmaxes = 1 + later, 2 * later, later
    if passes != FORWARD:
        products, sums, softmaxes = products + later + 3, sums + 3 * later + 4 * later + 1, 3 * later
    per_vector = 2 * case.predictions
    couplings = case.predictions // case.out_dim
    return Operations(products * per_vector * case.in_dim, sums * per_vector, softmaxes * couplings)
