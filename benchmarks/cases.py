"""The routing cases that are measured: sizes, inputs, and the exact result to check against."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from benchmarks.passes import run
from capsops import reference

Routing = Callable[[Tensor, Tensor, Tensor | None, int], Tensor]  # (u, weight, bias, iterations) -> v

# The reference keeps û in memory: it takes a slice of the batch at a time, of so many numbers of û.
_SLICE = 1 << 25


@dataclass(frozen=True)
class RoutingCase:
    """One capsule layer: u [B, I, K], weight [I, J, D, K] → v [B, J, D]; by default as in the paper."""

    batch: int
    in_capsules: int = 1152
    out_capsules: int = 10
    out_dim: int = 16
    in_dim: int = 8
    iterations: int = 3
    dtype: str = "float32"

    def __str__(self) -> str:
        name = f"B={self.batch} {self.in_capsules}×{self.out_capsules}"
        if (self.out_dim, self.in_dim, self.iterations) != (16, 8, 3):
            name += f" D={self.out_dim} K={self.in_dim} T={self.iterations}"
        return name if self.dtype == "float32" else f"{name} {self.dtype}"

    @property
    def predictions(self) -> int:
        """How many numbers û has."""
        return self.batch * self.in_capsules * self.out_capsules * self.out_dim

    def inputs(self, device: str = "cpu") -> tuple[tuple[Tensor, Tensor], Tensor]:
        """u and weight, which require gradients, and an upstream gradient of v. The same at every call.

        Of lengths at which the couplings are neither uniform nor one-hot.
        """
        random = torch.Generator().manual_seed(0)
        u = torch.randn(self.batch, self.in_capsules, self.in_dim, generator=random) * 0.3
        shape = (self.in_capsules, self.out_capsules, self.out_dim, self.in_dim)
        weight = torch.randn(shape, generator=random) * 0.1
        grad = torch.randn(self.batch, self.out_capsules, self.out_dim, generator=random)
        u, weight, grad = (x.to(device, getattr(torch, self.dtype)) for x in (u, weight, grad))
        return (u.requires_grad_(), weight.requires_grad_()), grad


def bound(routing: Routing, case: RoutingCase) -> Callable[[Tensor, Tensor], Tensor]:
    """The routing as a function of u and weight."""
    return partial(routing, bias=None, iterations=case.iterations)


def _reference(case: RoutingCase, passes: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    (u, weight), grad = case.inputs()
    u, grad = u.detach().to(dtype), grad.to(dtype)
    weight = weight.detach().to(dtype).requires_grad_()
    size = max(1, _SLICE // (case.predictions // case.batch))
    parts, grad_weight = [], None
    for u_part, grad_part in zip(u.split(size), grad.split(size), strict=True):
        function = bound(reference.capsule_routing, case)
        found = run(function, passes, (u_part.requires_grad_(), weight), grad_part)
        parts.append(found[:2])
        for x in found[2:]:
            grad_weight = x if grad_weight is None else grad_weight.add_(x)
    joined = tuple(torch.cat(x) for x in zip(*parts, strict=True))
    return joined if grad_weight is None else (*joined, grad_weight)


@lru_cache(maxsize=1)
def exact(case: RoutingCase, passes: str) -> tuple[Tensor, ...]:
    """What `run` gives in float64, by the reference."""
    return _reference(case, passes, torch.float64)


@lru_cache(maxsize=1)
def plain(case: RoutingCase, passes: str) -> tuple[Tensor, ...]:
    """What `run` gives in the case's own dtype, by the reference: how inexact that dtype is by itself."""
    return _reference(case, passes, getattr(torch, case.dtype))
