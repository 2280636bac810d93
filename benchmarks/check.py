"""A result is right, or it is not timed."""

from collections.abc import Sequence

import torch
from torch import Tensor


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖; not a number where `found` holds one."""
    exact = exact.double()
    return ((found.double() - exact).norm() / exact.norm()).item()


def check(
    name: str, found: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], terms: int
) -> float:
    """Raises AssertionError unless each result is as exact as its dtype allows; returns the largest error.

    `found` holds the value and then its gradients. An error may be twice (a gradient's three times) that of
    plain PyTorch in the same dtype, and beyond that √terms roundings of float32: the orders in which two
    correct programs sum `terms` products differ by no more.
    """
    rounding = terms**0.5 * torch.finfo(torch.float32).eps / 2
    worst = 0.0
    for i, (x, by_plain, truth) in enumerate(zip(found, plain, exact, strict=True)):
        error = relative_error(x, truth)
        bound = (3 if i else 2) * relative_error(by_plain, truth) + rounding
        what = f"gradient {i}" if i else "value"
        if not error <= bound:  # so that NaN fails
            raise AssertionError(
                f"{name}: {what} is off by {error:.2e} of its norm, at most {bound:.2e} is right"
            )
        worst = max(worst, error)
    return worst
