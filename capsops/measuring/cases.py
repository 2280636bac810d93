"""The calls that are measured: an op, its sizes and inputs, and the exact result to check against."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from capsops import reference
from capsops.measuring.passes import run
from capsops.measuring.precisions import PRECISIONS

Form = Callable[..., Tensor]  # an op of capsops, its reference, or a peer

# The reference stores û, so it takes the batch in slices of at most this many numbers of û.
_SLICE = 1 << 25


@dataclass(frozen=True)
class Case:
    """One op on one capsule layer: u [B, I, K], weight [I, J, D, K] → v [B, J, D]; the paper's by default."""

    batch: int
    in_capsules: int = 1152
    out_capsules: int = 10
    out_dim: int = 16
    in_dim: int = 8
    iterations: int = 3
    precision: str = "float32"  # of PRECISIONS
    op: str = "capsule_routing"

    def __str__(self) -> str:
        name = f"B={self.batch} {self.in_capsules}×{self.out_capsules}"
        if (self.out_dim, self.in_dim, self.iterations) != (16, 8, 3):
            name += f" D={self.out_dim} K={self.in_dim} T={self.iterations}"
        return name if self.precision == "float32" else f"{name} {self.precision}"

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision][0]

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, I, J, D, K."""
        return self.batch, self.in_capsules, self.out_capsules, self.out_dim, self.in_dim

    @property
    def shapes_of_layer(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of u and weight."""
        B, I, J, D, K = self.sizes  # noqa: E741
        return (B, I, K), (I, J, D, K)

    @property
    def predictions(self) -> int:
        """How many numbers û has."""
        return self.batch * self.in_capsules * self.out_capsules * self.out_dim

    @property
    def terms(self) -> int:
        """How many products the longest sum has."""
        _, I, J, D, K = self.sizes  # noqa: E741
        return {"squash": K, "predictions": J * D, "dynamic_routing": I}.get(self.op, I * K)

    def inputs(self, device: str | torch.device = "cpu") -> tuple[tuple[Tensor, ...], Tensor]:
        """The op's inputs, which require gradients, and an upstream gradient. The same at every call.

        Of lengths at which the couplings are neither uniform nor one-hot.
        """
        rng = torch.Generator(device).manual_seed(0)
        B, I, J, D, K = self.sizes  # noqa: E741

        def numbers(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=rng, device=device) * scale).to(self.dtype)

        inputs: tuple[Tensor, ...]
        if self.op == "dynamic_routing":
            inputs = (numbers(B, I, J, D, scale=0.1),)
        elif self.op == "squash":
            inputs = (numbers(B, I, K, scale=0.3),)
        else:
            inputs = numbers(B, I, K, scale=0.3), numbers(I, J, D, K, scale=0.1)
        grad = numbers(*{"squash": (B, I, K), "predictions": (B, I, J, D)}.get(self.op, (B, J, D)))
        return tuple(x.requires_grad_() for x in inputs), grad

    def bind(self, form: Form) -> Form:
        """A form of the op as a function of the inputs."""
        if self.op in ("squash", "predictions"):
            return form
        return partial(form, bias=None, iterations=self.iterations)


def _by_reference(
    case: Case, passes: str, dtype: torch.dtype, device: str | torch.device
) -> tuple[Tensor, ...]:
    inputs, grad = case.inputs(device)
    first, *shared = (x.detach().to(dtype).requires_grad_() for x in inputs)
    function = case.bind(getattr(reference, case.op))
    size = max(1, _SLICE // (case.predictions // case.batch))
    parts, sums = [], [torch.zeros_like(x) for x in shared]
    for first_part, grad_part in zip(first.detach().split(size), grad.to(dtype).split(size), strict=True):
        results = run(function, passes, (first_part.requires_grad_(), *shared), grad_part)
        parts.append(results[:2])
        sums = [a + b for a, b in zip(sums, results[2:], strict=False)]
    return *(torch.cat(x) for x in zip(*parts, strict=True)), *sums


@lru_cache(maxsize=1)
def exact(case: Case, passes: str, device: str | torch.device = "cpu") -> tuple[Tensor, ...]:
    """What `run` returns for the case's inputs on a device in float64, by the reference."""
    return _by_reference(case, passes, torch.float64, device)


@lru_cache(maxsize=1)
def plain(case: Case, passes: str, device: str | torch.device = "cpu") -> tuple[Tensor, ...]:
    """What `run` returns in the case's own dtype, by the reference: how inexact that dtype is by itself."""
    return _by_reference(case, passes, case.dtype, device)
