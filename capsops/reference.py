"""The specification: each op in a few lines of plain PyTorch, and nothing clever.

Axes: b batch, i input capsules, j output capsules, d dimension of an output capsule, k of an input capsule.
Every function computes in the dtype of its arguments and is differentiable to any order by autograd.
"""

import torch
from torch import Tensor


def squash(s: Tensor, dim: int = -1) -> Tensor:
    """squash(s) = s · r / (1 + r²), r = ‖s‖ along `dim` (Sabour et al. 2017, equation 1).

    r comes from a sum scaled by the largest component and, beyond 1, the result is s/r · 1 / (1 + 1/r²), so
    that every finite s, even where r overflows, gives a finite result with finite first and second
    derivatives, 0 at s = 0.
    """
    if s.numel() == 0:
        return s.clone()
    scale = s.detach().abs().amax(dim, keepdim=True)
    scale = torch.where(scale > 0, scale, 1)
    x = s / scale
    square = (x**2).sum(dim, keepdim=True)
    zero = square == 0
    length = torch.where(zero, 1, square).sqrt()
    r = torch.where(zero, 0, scale * length)
    small, large = r.clamp(max=1), r.clamp(min=1)
    return torch.where(r > 1, x / length / (1 + large**-2), s * (small / (1 + small**2)))


def predictions(u: Tensor, weight: Tensor) -> Tensor:
    """û_ij = W_ij u_i: u [B, I, K], weight [I, J, D, K] → û [B, I, J, D] (equation 2)."""
    return torch.einsum("bik,ijdk->bijd", u, weight)


def coupling_softmax(logits: Tensor, leaky: bool) -> Tensor:
    """Couplings: softmax over j; with `leaky` one more logit, fixed at 0, takes part and is dropped."""
    if leaky:
        logits = torch.cat([logits, torch.zeros_like(logits[..., :1])], dim=-1)
        return logits.softmax(-1)[..., :-1]
    return logits.softmax(-1)


def dynamic_routing(
    u_hat: Tensor,
    bias: Tensor | None = None,
    *,
    iterations: int = 3,
    leaky: bool = False,
    detach: bool = False,
    squash_output: bool = True,
) -> Tensor:
    """Routing by agreement (procedure 1): û [B, I, J, D], bias [J, D] → v [B, J, D].

    `iterations` counts softmax passes; 0 means couplings of 1. With `detach` the couplings carry no gradient.
    With `squash_output=False` the last s itself is the result.
    One output capsule without `leaky` is no routing: the softmax of one logit is always 1.
    """
    if iterations == 0 or (u_hat.shape[2] == 1 and not leaky):
        s = u_hat.sum(1)
        s = s if bias is None else s + bias
        return squash(s) if squash_output else s
    fixed = u_hat.detach() if detach else u_hat
    logits = u_hat.new_zeros(u_hat.shape[:3])
    for t in range(1, iterations + 1):
        last = t == iterations
        s = torch.einsum("bij,bijd->bjd", coupling_softmax(logits, leaky), u_hat if last else fixed)
        s = s if bias is None else s + bias
        v = s if last and not squash_output else squash(s)
        if not last:
            logits = logits + torch.einsum("bijd,bjd->bij", fixed, v.detach() if detach else v)
    return v


def capsule_routing(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    iterations: int = 3,
    leaky: bool = False,
    detach: bool = False,
    squash_output: bool = True,
) -> Tensor:
    """dynamic_routing(predictions(u, weight), bias): u [B, I, K], weight [I, J, D, K] → v [B, J, D]."""
    return dynamic_routing(
        predictions(u, weight),
        bias,
        iterations=iterations,
        leaky=leaky,
        detach=detach,
        squash_output=squash_output,
    )


def couplings(
    u: Tensor, weight: Tensor, bias: Tensor | None = None, *, iterations: int = 3, leaky: bool = False
) -> Tensor:
    """c of the last pass [B, I, J], without gradient; ones where there is no routing."""
    u_hat = predictions(u.detach(), weight.detach())
    logits = u_hat.new_zeros(u_hat.shape[:3])
    if iterations == 0 or (weight.shape[1] == 1 and not leaky):
        return logits + 1
    for t in range(1, iterations):
        v = dynamic_routing(u_hat, None if bias is None else bias.detach(), iterations=t, leaky=leaky)
        logits = logits + torch.einsum("bijd,bjd->bij", u_hat, v)
    return coupling_softmax(logits, leaky)
