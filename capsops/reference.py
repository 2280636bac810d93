"""The specification: each op in a few lines of plain PyTorch, and nothing clever.

Axes: b batch, i input capsules, j output capsules, d dimension of an output capsule, k of an input capsule.
Every function computes in the dtype of its arguments and is differentiable to any order by autograd.
"""

import torch
from torch import Tensor

CLOSED = -torch.inf  # a logit that closes a pair of capsules


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
    """û_ij = W_ij u_i: u [B, I, K], weight [I, J, D, K] → û [B, I, J, D] (equation 2).

    A weight [J, D, K], or [1, J, D, K], is shared by all input capsules: û_ij = W_j u_i.
    """
    if weight.dim() == 3:
        weight = weight.unsqueeze(0)
    return torch.einsum("bik,ijdk->bijd", u, weight)


def coupling_softmax(logits: Tensor, leaky: bool) -> Tensor:
    """Couplings: softmax over j; with `leaky` one more logit, fixed at 0, takes part and is dropped."""
    if leaky:
        logits = torch.cat([logits, torch.zeros_like(logits[..., :1])], dim=-1)
        return logits.softmax(-1)[..., :-1]
    return logits.softmax(-1)


def closable_softmax(logits: Tensor, leaky: bool) -> Tensor:
    """coupling_softmax where pairs may be closed: couplings of 0 for an input whose pairs are all closed."""
    if leaky:  # the orphan takes all
        return coupling_softmax(logits, leaky)
    none_open = (logits == CLOSED).all(-1, keepdim=True)
    return torch.where(none_open, 0, coupling_softmax(torch.where(none_open, 0, logits), leaky))


def open_pairs(logits: Tensor) -> Tensor:
    """The couplings without routing: 1, and 0 where a pair is closed."""
    return torch.where(logits == CLOSED, 0, torch.ones_like(logits))


def out_capsules(u_hat: Tensor, bias: Tensor | None, logits: Tensor | None) -> int:
    """J: for û [B, I, D], the same for all output capsules, that of `logits`, or else of `bias`."""
    if u_hat.dim() == 4:
        return u_hat.shape[2]
    of_logits = 1 if logits is None or logits.dim() == 0 else logits.shape[-1]
    return bias.shape[0] if of_logits == 1 and bias is not None else of_logits


def dynamic_routing(
    u_hat: Tensor,
    bias: Tensor | None = None,
    *,
    logits: Tensor | None = None,
    mask: Tensor | None = None,
    iterations: int = 3,
    leaky: bool = False,
    detach: bool = False,
    squash_output: bool = True,
) -> Tensor:
    """Routing by agreement (procedure 1): û [B, I, J, D], bias [J, D] → v [B, J, D].

    û [B, I, D] is the same for all output capsules. `logits`, broadcast to [B, I, J], are those of the
    first pass; −inf closes a pair, whose coupling is then 0. Input capsules whose `mask` [B, I] is False are
    absent. `iterations` counts softmax passes; 0 means that the coupling of every open pair is 1. With
    `detach`, û gets a gradient only through the last weighted sum, `logits` only through the last softmax.
    With `squash_output=False` the last s itself is the result. One output capsule without `leaky` and
    without `logits` is no routing: the softmax of one logit is always 1.
    """
    J = out_capsules(u_hat, bias, logits)
    if u_hat.dim() == 3:
        u_hat = u_hat.unsqueeze(2).expand(-1, -1, J, -1)
    if mask is not None:
        u_hat = torch.where(mask[:, :, None, None], u_hat, 0)
    if logits is None and (iterations == 0 or (J == 1 and not leaky)):
        s = u_hat.sum(1)
        s = s if bias is None else s + bias
        return squash(s) if squash_output else s
    fixed = u_hat.detach() if detach else u_hat
    softmax = coupling_softmax if logits is None else closable_softmax
    b = u_hat.new_zeros(u_hat.shape[:3]) if logits is None else logits.expand(u_hat.shape[:3])
    passes = max(iterations, 1)
    for t in range(1, passes + 1):
        last = t == passes
        c = softmax(b, leaky) if iterations else open_pairs(b)
        s = torch.einsum("bij,bijd->bjd", c, u_hat if last else fixed)
        s = s if bias is None else s + bias
        v = s if last and not squash_output else squash(s)
        if not last:
            b = b + torch.einsum("bijd,bjd->bij", fixed, v.detach() if detach else v)
    return v


def capsule_routing(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logits: Tensor | None = None,
    mask: Tensor | None = None,
    iterations: int = 3,
    leaky: bool = False,
    detach: bool = False,
    squash_output: bool = True,
) -> Tensor:
    """dynamic_routing(predictions(u, weight), bias): u [B, I, K], weight [I, J, D, K] → v [B, J, D].

    A weight [J, D, K], or [1, J, D, K], is shared by all input capsules.
    """
    if mask is not None:
        u = torch.where(mask[:, :, None], u, 0)
    return dynamic_routing(
        predictions(u, weight),
        bias,
        logits=logits,
        mask=mask,
        iterations=iterations,
        leaky=leaky,
        detach=detach,
        squash_output=squash_output,
    )


def couplings(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logits: Tensor | None = None,
    mask: Tensor | None = None,
    iterations: int = 3,
    leaky: bool = False,
) -> Tensor:
    """c of the last pass [B, I, J], without gradient; 1 without routing, 0 where `mask` is False."""
    u, weight = u.detach(), weight.detach()
    bias, logits = (None if x is None else x.detach() for x in (bias, logits))
    if mask is not None:
        u = torch.where(mask[:, :, None], u, 0)
    u_hat = predictions(u, weight)
    b = u_hat.new_zeros(u_hat.shape[:3]) if logits is None else logits.expand(u_hat.shape[:3])
    if iterations == 0 or (u_hat.shape[2] == 1 and not leaky and logits is None):
        c = open_pairs(b)
    else:
        for t in range(1, iterations):
            v = dynamic_routing(u_hat, bias, logits=logits, mask=mask, iterations=t, leaky=leaky)
            b = b + torch.einsum("bijd,bjd->bij", u_hat, v)
        c = coupling_softmax(b, leaky) if logits is None else closable_softmax(b, leaky)
    return c if mask is None else torch.where(mask[:, :, None], c, 0)
