"""What capsops is compared with: dynamic routing in plain PyTorch, as people write it, written well.

Same mathematics as the reference: T passes with the full gradient, the first with its uniform couplings as
a mean instead of a softmax of zeros, logits as û · V with V the sum of the earlier outputs. Two forms of
each of the two steps, which is three layers, each also under torch.compile; the fastest in a case is that
case's peer.

- û by a broadcast matrix product, W[None] @ u[..., None], or by einsum;
- the reductions of the routing as products and sums of broadcast tensors, which a compiler fuses, or by
  einsum, which are batched matrix products.
"""

import torch
from torch import Tensor

from capsops.measuring.cases import Form


def squash(s: Tensor) -> Tensor:
    """s · ‖s‖ / (1 + ‖s‖²) along the last axis."""
    square = s.square().sum(-1, keepdim=True)
    return s * (square.sqrt() / (1 + square))


def _add(s: Tensor, bias: Tensor | None) -> Tensor:
    return s if bias is None else s + bias


def route_by_sums(u_hat: Tensor, bias: Tensor | None, iterations: int) -> Tensor:
    """û [B, I, J, D] → v [B, J, D] by broadcast products and sums."""
    s = u_hat.sum(1)
    v = squash(_add(s if iterations == 0 else s / u_hat.shape[2], bias))
    total = v
    for _ in range(1, iterations):
        c = (u_hat * total[:, None]).sum(-1).softmax(-1)
        v = squash(_add((c[..., None] * u_hat).sum(1), bias))
        total = total + v
    return v


def route_by_einsum(u_hat: Tensor, bias: Tensor | None, iterations: int) -> Tensor:
    """û [B, J, I, D], the layout in which each einsum is a batched product without a copy → v [B, J, D]."""
    s = u_hat.sum(2)
    v = squash(_add(s if iterations == 0 else s / u_hat.shape[1], bias))
    total = v
    for _ in range(1, iterations):
        c = torch.einsum("bjid,bjd->bji", u_hat, total).softmax(1)
        v = squash(_add(torch.einsum("bji,bjid->bjd", c, u_hat), bias))
        total = total + v
    return v


def predictions_by_matmul(u: Tensor, weight: Tensor) -> Tensor:
    """û [B, I, J, D]."""
    return (weight[None] @ u[:, :, None, :, None]).squeeze(-1)


def predictions_by_einsum(u: Tensor, weight: Tensor) -> Tensor:
    """û [B, I, J, D]."""
    return torch.einsum("bik,ijdk->bijd", u, weight)


def einsum(u: Tensor, weight: Tensor, bias: Tensor | None, iterations: int) -> Tensor:
    """The einsum form throughout. The one copy of û, into the layout of the routing, saves one a pass."""
    u_hat = torch.einsum("bik,ijdk->bjid", u, weight).contiguous()
    return route_by_einsum(u_hat, bias, iterations)


def by_sums(predictions: Form) -> Form:
    """Routing by sums of û as `predictions` makes it."""
    return lambda u, weight, bias, iterations: route_by_sums(predictions(u, weight), bias, iterations)


def einsum_of_predictions(u_hat: Tensor, bias: Tensor | None, iterations: int) -> Tensor:
    """Routing of û [B, I, J, D] by einsum, in the layout that saves a copy a pass."""
    return route_by_einsum(u_hat.transpose(1, 2).contiguous(), bias, iterations)


FORMS: dict[str, dict[str, Form]] = {
    "capsule_routing": {
        "matmul": by_sums(predictions_by_matmul),
        "einsum": einsum,
        "einsum + sums": by_sums(predictions_by_einsum),
    },
    "dynamic_routing": {"sums": route_by_sums, "einsum": einsum_of_predictions},
    "predictions": {"matmul": predictions_by_matmul, "einsum": predictions_by_einsum},
    "squash": {"plain": squash},
    "couplings": {},
}


def with_compiled(forms: dict[str, Form]) -> dict[str, Form]:
    """Each form eager and under torch.compile, for one shape: code compiled for another is dropped."""
    torch.compiler.reset()
    compiled = {f"{name}, compiled": torch.compile(form, dynamic=False) for name, form in forms.items()}
    return {**forms, **compiled}
