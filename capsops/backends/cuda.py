"""The CUDA kernels of csrc/cuda, for tensors on NVIDIA GPUs.

Kernels run on the current stream of the tensors' device, whichever device is current; all memory comes from
torch's allocator, nothing waits for the device, and a call inside a CUDA graph's capture is captured.
"""

import re
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from capsops.backends import extension
from capsops.backends.backend import Backend, by_name
from capsops.backends.device import Device
from capsops.backends.extension import memory, vectors

_cuda: Any
_cuda, _unavailable = extension.load("cuda")

# The numbers by which the extension knows the dtypes.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _empty(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _allows_tf32() -> bool:
    """Whether torch's own matrix products may round float32 to TF32, by its newer or its older setting."""
    backends: Any = torch.backends
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        precision = matmul.fp32_precision
        if precision == "none":
            precision = backends.fp32_precision
        return precision == "tf32"
    return matmul.allow_tf32


def _like(x: Tensor, needed: bool = True) -> Tensor | None:
    return _empty(x.shape, x.dtype, x.device) if needed else None


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


def _squash(s: Tensor, grad: Tensor | None, dim: int) -> Tensor:
    out = _empty(s.shape, s.dtype, s.device)
    _cuda.squash(
        memory(s),
        memory(grad),
        memory(out),
        *vectors(s, dim),
        _DTYPES[s.dtype],
        s.get_device(),
        _stream(s.device),
    )
    return out


def squash(s: Tensor, dim: int) -> Tensor:
    return _squash(s, None, dim)


def squash_backward(grad: Tensor, s: Tensor, dim: int) -> Tensor:
    return _squash(s, grad, dim)


def predictions(u: Tensor, weight: Tensor) -> Tensor:
    u_hat = _empty((u.shape[0], *weight.shape[:3]), u.dtype, u.device)
    _cuda.predictions(
        memory(u),
        memory(weight),
        memory(u_hat),
        u.shape[0],
        *weight.shape,
        _DTYPES[u.dtype],
        u.get_device(),
        _stream(u.device),
    )
    return u_hat


def predictions_backward(
    grad: Tensor, u: Tensor, weight: Tensor, needs_u: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    grad_u, grad_weight = _like(u, needs_u), _like(weight, needs_weight)
    _cuda.predictions_backward(
        memory(grad),
        memory(u),
        memory(weight),
        memory(grad_u),
        memory(grad_weight),
        u.shape[0],
        *weight.shape,
        _DTYPES[u.dtype],
        u.get_device(),
        _stream(u.device),
    )
    return _or_empty(grad_u, u), _or_empty(grad_weight, u)


def _call(u: Tensor, weight: Tensor | None, iterations: int, leaky: bool, detach: bool = False) -> Any:
    shape = (*u.shape, 1) if weight is None else (u.shape[0], *weight.shape)
    tf32 = u.dtype != torch.float32 or _allows_tf32()  # 16-bit numbers are exact in TF32
    return _cuda.RoutingCall(*shape, iterations, leaky, detach, _DTYPES[u.dtype], tf32)


def _run(op: Any, call: Any, u: Tensor) -> None:
    device = u.get_device()
    workspace = _empty((call.workspace(op, device),), torch.uint8, u.device)
    call.run(op, memory(workspace), device, _stream(u.device))


def _route(
    u: Tensor, weight: Tensor | None, bias: Tensor | None, iterations: int, leaky: bool
) -> tuple[Tensor, Tensor]:
    """v and s of all passes."""
    call = _call(u, weight, iterations, leaky)
    shape = (u.shape[0], *(u.shape[2:] if weight is None else weight.shape[1:3]))
    v = _empty(shape, u.dtype, u.device)
    s = _empty((max(iterations, 1), *shape), torch.float32, u.device)
    call.point(u=memory(u), weight=memory(weight), bias=memory(bias), v=memory(v), s=memory(s))
    _run(_cuda.RoutingOp.forward, call, u)
    return v, s


def dynamic_routing(
    u_hat: Tensor,
    bias: Tensor | None,
    logits: None,
    mask: None,
    iterations: int,
    leaky: bool,
    squash_output: bool,
) -> tuple[Tensor, Tensor]:
    return _route(u_hat, None, bias, iterations, leaky)


def capsule_routing(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: None,
    mask: None,
    iterations: int,
    leaky: bool,
    squash_output: bool,
) -> tuple[Tensor, Tensor]:
    return _route(u, weight, bias, iterations, leaky)


def dynamic_routing_backward(
    grad: Tensor,
    u_hat: Tensor,
    logits: None,
    mask: None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    needs_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _call(u_hat, None, iterations, leaky, detach)
    grad_u_hat, grad_bias = (
        _empty(shape, u_hat.dtype, u_hat.device) for shape in (u_hat.shape, u_hat.shape[2:])
    )
    call.point(
        u=memory(u_hat),
        s=memory(s),
        grad=memory(grad),
        grad_u=memory(grad_u_hat),
        grad_bias=memory(grad_bias),
    )
    _run(_cuda.RoutingOp.backward, call, u_hat)
    return grad_u_hat, grad_bias, u_hat.new_empty(0)


def capsule_routing_backward(
    grad: Tensor,
    u: Tensor,
    weight: Tensor,
    logits: None,
    mask: None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    needs_u: bool,
    needs_weight: bool,
    needs_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _call(u, weight, iterations, leaky, detach)
    grad_u, grad_weight = _like(u, needs_u), _like(weight, needs_weight)
    grad_bias = _empty(weight.shape[1:3], u.dtype, u.device)
    call.point(
        u=memory(u),
        weight=memory(weight),
        s=memory(s),
        grad=memory(grad),
        grad_u=memory(grad_u),
        grad_weight=memory(grad_weight),
        grad_bias=memory(grad_bias),
    )
    _run(_cuda.RoutingOp.backward, call, u)
    return _or_empty(grad_u, u), _or_empty(grad_weight, u), grad_bias, u.new_empty(0)


def couplings(
    u: Tensor, weight: Tensor, bias: Tensor | None, logits: None, mask: None, iterations: int, leaky: bool
) -> Tensor:
    c = _empty((u.shape[0], *weight.shape[:2]), u.dtype, u.device)
    if iterations <= 1:
        return c.fill_(1 if iterations == 0 else 1 / (weight.shape[1] + leaky))
    call = _call(u, weight, iterations, leaky)
    call.point(u=memory(u), weight=memory(weight), bias=memory(bias), couplings=memory(c))
    _run(_cuda.RoutingOp.couplings, call, u)
    return c


def _code_for(capability: tuple[int, int]) -> str:
    """The code of the extension that a GPU runs, the best there is; empty where it has none for it.

    "sm_90" is machine code, "compute_90" PTX, which the driver compiles.
    """
    archs = str(extension.build_record().get("cuda", {}).get("archs") or "")
    major, minor = capability
    code = {}
    for digits, specific, ptx in re.findall(r"(\d+)([af]?)(\+PTX)?", archs):
        arch = int(digits[:-1]), int(digits[-1])
        if arch == capability or (arch[0] == major and arch[1] <= minor and not specific):
            code[1, arch] = f"sm_{digits}{specific}"
        if ptx and arch <= capability and not specific:
            code[0, arch] = f"compute_{digits}"
    return code[max(code)] if code else ""


def _why_not_on(device: Device) -> str:
    record = extension.build_record().get("cuda", {})
    if device.why_too_old:
        return device.why_too_old
    if not _cuda.device_count():
        return (
            f"the NVIDIA driver, {device.driver}, is too old for the CUDA toolkit that built the kernels"
            f" ({record.get('toolkit') or record.get('compiler', 'unknown')}): update the driver, or install"
            " capsops again with an older toolkit"
        )
    if not _code_for(device.capability):
        arch = "{}{}".format(*device.capability)
        return (
            f"the extension is built for {record.get('archs') or 'unknown architectures'}, not for {arch}:"
            f" install capsops again with CAPSOPS_CUDA_ARCHS={arch}"
        )
    return ""


def _kernels(device: Device) -> str:
    fingerprint = extension.build_record().get("cuda", {}).get("fingerprint", "unknown")
    return f"{fingerprint} {_code_for(device.capability)}"


@lru_cache
def _code() -> str:
    return extension.code_hash(_cuda, __file__)


BACKEND = Backend(
    name="cuda",
    functions=by_name(
        squash,
        squash_backward,
        predictions,
        predictions_backward,
        dynamic_routing,
        dynamic_routing_backward,
        capsule_routing,
        capsule_routing_backward,
        couplings,
    ),
    devices=("cuda",),
    dtypes=tuple(_DTYPES),
    unavailable=_unavailable,
    needs_proof=True,
    why_not_on=_why_not_on,
    kernels=_kernels,
    code=_code,
)
