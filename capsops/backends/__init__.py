"""Implementations of the ops. Each module offers the same functions and knows nothing of the others.

Tensors that arrive here are contiguous, of one dtype and one device, non-empty and of fitting shapes.

    squash(s, dim) -> v
    squash_backward(grad, s, dim) -> ∂s
    predictions(u, weight) -> û
    predictions_backward(grad, u, weight, needs_u, needs_weight) -> ∂u, ∂W
    dynamic_routing(u_hat, bias, iterations, leaky, squash_output) -> v, s
    dynamic_routing_backward(grad, u_hat, s, iterations, leaky, detach, squash_output) -> ∂û, ∂β
    capsule_routing(u, weight, bias, iterations, leaky, squash_output) -> v, s
    capsule_routing_backward(
        grad, u, weight, s, iterations, leaky, detach, squash_output, needs_u, needs_weight
    ) -> ∂u, ∂W, ∂β
    couplings(u, weight, bias, iterations, leaky) -> c

With squash_output=False v is sᵗ of the last pass, not squashed; Triton and CUDA do not serve that.
s holds sᵗ of every pass, [max(T, 1), B, J, D], in the accumulation dtype (float32 for 16-bit tensors).
A gradient that is not needed is an empty tensor of shape [0].
"""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a storage dtype is summed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def decline_unsquashed(impl: str, squash_output: bool) -> None:
    """For an implementation that always squashes.

    Raises:
        ValueError: the last s itself is asked for.
    """
    if not squash_output:
        raise ValueError(f"squash_output: got False, takes True: impl={impl!r} does not serve it unsquashed")
