"""A result is right, or it is not timed."""

from collections.abc import Sequence

import torch
from torch import Tensor


def relative_error(result: Tensor, exact: Tensor) -> float:
    """‖result − exact‖ / ‖exact‖, without the division where exact is 0; NaN where the result holds one."""
    exact = exact.double()
    return (result.double() - exact).norm().item() / (exact.norm().item() or 1.0)


def check(
    name: str, results: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], terms: int
) -> float:
    """Raises AssertionError unless each result is as exact as its dtype allows; returns the largest error.

    `results` are the value and then its gradients. An error may be twice (a gradient's three times) that of
    plain PyTorch in the same dtype, and beyond that √terms roundings of float32: the orders in which two
    correct programs sum `terms` products differ by no more.
    """
    rounding = terms**0.5 * torch.finfo(torch.float32).eps / 2
    worst = 0.0
    for i, (x, by_plain, truth) in enumerate(zip(results, plain, exact, strict=True)):
        error = relative_error(x, truth)
        bound = (3 if i else 2) * relative_error(by_plain, truth) + rounding
        what = f"gradient {i}" if i else "value"
        if not error <= bound:  # so that NaN fails
            raise AssertionError(
                f"{name}: {what} is off by {error:.2e} of its norm; the bound is {bound:.2e}"
            )
        worst = max(worst, error)
    return worst
