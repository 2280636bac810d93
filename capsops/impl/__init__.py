"""Implementations of the ops. Each module offers the same functions and knows nothing of the others.

Tensors that arrive here are contiguous, of one dtype and one device, non-empty and of fitting shapes.

    squash(s, dim) -> v
    squash_backward(grad, s, dim) -> ∂s
    predictions(u, weight) -> û
    predictions_backward(grad, u, weight, needs_u, needs_weight) -> ∂u, ∂W
    dynamic_routing(u_hat, bias, iterations, leaky) -> v, s
    dynamic_routing_backward(grad, u_hat, s, iterations, leaky, detach) -> ∂û, ∂β
    capsule_routing(u, weight, bias, iterations, leaky) -> v, s
    capsule_routing_backward(grad, u, weight, s, iterations, leaky, detach, needs_u, needs_weight)
        -> ∂u, ∂W, ∂β
    couplings(u, weight, bias, iterations, leaky) -> c

s holds sᵗ of every pass, [max(T, 1), B, J, D], in the accumulation dtype (float32 for 16-bit tensors).
A gradient that is not needed is an empty tensor of shape [0].
"""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a storage dtype is summed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
