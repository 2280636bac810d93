"""The ops by the CUDA kernels of csrc/cuda: allocates results and workspace, passes addresses.

Kernels run on the current stream of the tensors' device, whichever device is current; all memory comes from
torch's allocator, nothing waits for the device, and a call inside a CUDA graph's capture is captured.
"""

import torch
from torch import Tensor

import capsops._cuda as _cuda
from capsops.backends import decline_unsquashed

device_count = _cuda.device_count

_STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _empty(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _storage(x: Tensor) -> int:
    if x.dtype not in _STORAGE:
        raise ValueError(
            f"impl='cuda' takes float32, bfloat16 or float16, got {x.dtype};"
            " impl='reference' computes in float64"
        )
    return _STORAGE[x.dtype]


def _allows_tf32() -> bool:
    """Whether torch's own matrix products may round float32 to TF32, by its newer or its older setting."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        precision = matmul.fp32_precision
        if precision == "none":
            precision = torch.backends.fp32_precision
        return precision == "tf32"
    return matmul.allow_tf32


def _memory(x: Tensor | None) -> tuple[int, int]:
    """What a kernel is told of a tensor: its address and its bytes."""
    return (0, 0) if x is None else (x.data_ptr(), x.nbytes)


def _like(x: Tensor, needed: bool = True) -> Tensor | None:
    return _empty(x.shape, x.dtype, x.device) if needed else None


def _given(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


def _squash(s: Tensor, grad: Tensor | None, dim: int) -> Tensor:
    storage, out = _storage(s), _empty(s.shape, s.dtype, s.device)
    outer = inner = 1
    for size in s.shape[:dim]:
        outer *= size
    for size in s.shape[dim + 1 :]:
        inner *= size
    _cuda.squash(
        _memory(s),
        _memory(grad),
        _memory(out),
        outer,
        s.shape[dim],
        inner,
        storage,
        s.get_device(),
        _stream(s.device),
    )
    return out


def squash(s: Tensor, dim: int) -> Tensor:
    return _squash(s, None, dim)


def squash_backward(grad: Tensor, s: Tensor, dim: int) -> Tensor:
    return _squash(s, grad, dim)


def predictions(u: Tensor, weight: Tensor) -> Tensor:
    storage, u_hat = _storage(u), _empty((u.shape[0], *weight.shape[:3]), u.dtype, u.device)
    _cuda.predictions(
        _memory(u),
        _memory(weight),
        _memory(u_hat),
        u.shape[0],
        *weight.shape,
        storage,
        u.get_device(),
        _stream(u.device),
    )
    return u_hat


def predictions_backward(
    grad: Tensor, u: Tensor, weight: Tensor, needs_u: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    storage, grad_u, grad_weight = _storage(u), _like(u, needs_u), _like(weight, needs_weight)
    _cuda.predictions_backward(
        _memory(grad),
        _memory(u),
        _memory(weight),
        _memory(grad_u),
        _memory(grad_weight),
        u.shape[0],
        *weight.shape,
        storage,
        u.get_device(),
        _stream(u.device),
    )
    return _given(grad_u, u), _given(grad_weight, u)


def _call(
    u: Tensor, weight: Tensor | None, iterations: int, leaky: bool, detach: bool = False
) -> _cuda.RoutingCall:
    shape = (*u.shape, 1) if weight is None else (u.shape[0], *weight.shape)
    tf32 = u.dtype != torch.float32 or _allows_tf32()  # 16-bit numbers are exact in TF32
    return _cuda.RoutingCall(*shape, iterations, leaky, detach, _storage(u), tf32)


def _run(op: _cuda.RoutingOp, call: _cuda.RoutingCall, u: Tensor) -> None:
    device = u.get_device()
    workspace = _empty((call.workspace(op, device),), torch.uint8, u.device)
    call.run(op, _memory(workspace), device, _stream(u.device))


def _route(
    u: Tensor, weight: Tensor | None, bias: Tensor | None, iterations: int, leaky: bool
) -> tuple[Tensor, Tensor]:
    """v and s of all passes."""
    call = _call(u, weight, iterations, leaky)
    shape = (u.shape[0], *(u.shape[2:] if weight is None else weight.shape[1:3]))
    v = _empty(shape, u.dtype, u.device)
    s = _empty((max(iterations, 1), *shape), torch.float32, u.device)
    call.point(u=_memory(u), weight=_memory(weight), bias=_memory(bias), v=_memory(v), s=_memory(s))
    _run(_cuda.RoutingOp.forward, call, u)
    return v, s


def dynamic_routing(
    u_hat: Tensor, bias: Tensor | None, iterations: int, leaky: bool, squash_output: bool
) -> tuple[Tensor, Tensor]:
    decline_unsquashed("cuda", squash_output)
    return _route(u_hat, None, bias, iterations, leaky)


def capsule_routing(
    u: Tensor, weight: Tensor, bias: Tensor | None, iterations: int, leaky: bool, squash_output: bool
) -> tuple[Tensor, Tensor]:
    decline_unsquashed("cuda", squash_output)
    return _route(u, weight, bias, iterations, leaky)


def dynamic_routing_backward(
    grad: Tensor, u_hat: Tensor, s: Tensor, iterations: int, leaky: bool, detach: bool, squash_output: bool
) -> tuple[Tensor, Tensor]:
    decline_unsquashed("cuda", squash_output)
    call = _call(u_hat, None, iterations, leaky, detach)
    grad_u_hat, grad_bias = _like(u_hat), _empty(u_hat.shape[2:], u_hat.dtype, u_hat.device)
    call.point(
        u=_memory(u_hat),
        s=_memory(s),
        grad=_memory(grad),
        grad_u=_memory(grad_u_hat),
        grad_bias=_memory(grad_bias),
    )
    _run(_cuda.RoutingOp.backward, call, u_hat)
    return grad_u_hat, grad_bias


def capsule_routing_backward(
    grad: Tensor,
    u: Tensor,
    weight: Tensor,
    s: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    needs_u: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    decline_unsquashed("cuda", squash_output)
    call = _call(u, weight, iterations, leaky, detach)
    grad_u, grad_weight = _like(u, needs_u), _like(weight, needs_weight)
    grad_bias = _empty(weight.shape[1:3], u.dtype, u.device)
    call.point(
        u=_memory(u),
        weight=_memory(weight),
        s=_memory(s),
        grad=_memory(grad),
        grad_u=_memory(grad_u),
        grad_weight=_memory(grad_weight),
        grad_bias=_memory(grad_bias),
    )
    _run(_cuda.RoutingOp.backward, call, u)
    return _given(grad_u, u), _given(grad_weight, u), grad_bias


def couplings(u: Tensor, weight: Tensor, bias: Tensor | None, iterations: int, leaky: bool) -> Tensor:
    call = _call(u, weight, iterations, leaky)
    c = _empty((u.shape[0], *weight.shape[:2]), u.dtype, u.device)
    if iterations <= 1:
        return c.fill_(1 if iterations == 0 else 1 / (weight.shape[1] + leaky))
    call.point(u=_memory(u), weight=_memory(weight), bias=_memory(bias), couplings=_memory(c))
    _run(_cuda.RoutingOp.couplings, call, u)
    return c
