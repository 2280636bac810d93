"""torch.ops.capsops.couplings: the couplings c [B, I, J] of the last pass of capsule_routing. No gradient."""

from torch import Tensor

from capsops.ops._arguments import effective_iterations
from capsops.ops._register import ROUTING, contiguous, implementation, register
from capsops.ops.capsule_routing import check

SCHEMA = f"(Tensor u, Tensor weight, {ROUTING}, str impl) -> Tensor"


def kernel(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    impl: str,
) -> Tensor:
    check(u, weight, bias, logits, mask, iterations)
    iterations = effective_iterations(iterations, weight.shape[1], leaky)
    serve = implementation(impl, u, weight, lengths=weight.shape[2:])
    return serve.couplings(u.contiguous(), weight.contiguous(), contiguous(bias), iterations, leaky)


def fake(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    impl: str,
) -> Tensor:
    check(u, weight, bias, logits, mask, iterations)
    return u.new_empty(u.shape[0], *weight.shape[:2])


register("couplings", SCHEMA, kernel, fake, autocast=True)
