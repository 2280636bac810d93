"""Floating-point operations as torch.utils.flop_counter counts them: those of products of matrices.

û = W u has 2 · B · I · J · D · K of them; the logits û · V, a sum Σ_i c û, and each of their gradients have
2 · B · I · J · D. Element-wise operations do not count, nor does it matter whether a kernel makes û anew.
"""

from collections.abc import Sequence
from math import prod

from capsops.ops._shared_checks import effective_iterations

Shape = Sequence[int]


def later_passes(iterations: int, out_capsules: int, leaky: bool, logits: object = None) -> int:
    """The number of passes that have logits û · V: those after the first."""
    return max(effective_iterations(iterations, out_capsules, leaky, logits) - 1, 0)


def product(u: Shape, weight: Shape) -> int:
    """Operations of û = W u, or of the gradient of u or of `weight`; the arguments are shapes."""
    return 2 * u[0] * prod(weight)


def forward(u_hat: Shape, later: int) -> int:
    """Operations of the weighted sums of all passes and of the logits of the later ones."""
    return 2 * prod(u_hat) * (1 + 2 * later)


def backward(u_hat: Shape, later: int, detach: bool, needs_logits: bool) -> int:
    """Operations of the gradients of the sums, and of the logits where the couplings carry a gradient.

    The first pass, and the last with `detach`, has one product: ∂û of its sum. It has ∂c too where the
    starting logits need a gradient. Every other pass has four: ∂c and ∂û of its sum, ∂û and ∂V of its logits.
    """
    return 2 * prod(u_hat) * (1 + needs_logits + (0 if detach else 4 * later))


def shared_forward(u: Shape, weight: Shape, later: int) -> int:
    """forward() with a weight shared by all input capsules, [J, D, K]: û is never formed.

    A sum is W (Σ_i c u), and logits are u · (Wᵀ V): products of K numbers for each (b, i, j), and one with W
    for each (b, j).
    """
    batch, in_capsules, in_dim = u
    out_capsules, out_dim, _ = weight
    return forward((batch, in_capsules + out_dim, out_capsules, in_dim), later)


def shared_backward(
    u: Shape, weight: Shape, later: int, detach: bool, needs_u: bool, needs_weight: bool, needs_logits: bool
) -> int:
    """Two gradients of each product of shared_forward(); of the first couplings only if logits need it."""
    batch, in_capsules, in_dim = u
    out_capsules, out_dim, _ = weight
    products = 1 if detach else 1 + 2 * later
    of_inputs = 2 * batch * in_capsules * out_capsules * in_dim
    of_weight = 2 * batch * out_capsules * out_dim * in_dim
    of_couplings = products - 1 + needs_logits
    return of_inputs * (of_couplings + products * needs_u) + of_weight * products * (1 + needs_weight)
