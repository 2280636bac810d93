"""The CUDA kernels of csrc/cuda, for tensors on NVIDIA GPUs.

Kernels run on the current stream of the tensors' device, whichever device is current; all memory comes from
torch's allocator, nothing waits for the device, and a call inside a CUDA graph's capture is captured.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from capsops import reference
from capsops.backends import extension
from capsops.backends.backend import Backend, by_name
from capsops.backends.device import Device
from capsops.backends.extension import memory, routing_options, vectors

_cuda: Any
_cuda, _unavailable = extension.load("cuda")

# The numbers by which the extension knows the dtypes.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_torch: Any = torch._C
# The raw stream that is current on the device with this index; only torch's builds for GPUs have it.
_stream: Any = getattr(_torch, "_cuda_getCurrentRawStream", None)
_precision = getattr(_torch, "_get_fp32_precision_getter", None)  # since torch 2.9
_empty = Tensor.new_empty  # with a torch.Size in place of numbers it takes twice as long

# Bytes of workspace that calls have taken, by what they depend on.
_workspaces: dict[tuple, int] = {}
_MOST_WORKSPACES = 4096


def _allows_tf32() -> bool:
    """Whether torch's own matrix products may round float32 to TF32, by its newer or its older setting."""
    if _precision is None:
        return torch.backends.cuda.matmul.allow_tf32
    precision = _precision("cuda", "matmul")
    if precision == "none":
        precision = _precision("generic", "all")
    return precision == "tf32"


def _like(x: Tensor, needed: bool = True) -> Tensor | None:
    return _empty(x, *x.shape) if needed else None


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return _empty(like, 0) if x is None else x


def _squash(s: Tensor, grad: Tensor | None, dim: int) -> Tensor:
    out = _empty(s, *s.shape)
    _cuda.squash(
        memory(s),
        memory(grad),
        memory(out),
        *vectors(s, dim),
        _DTYPES[s.dtype],
        device := s.get_device(),
        _stream(device),
    )
    return out


def squash(s: Tensor, dim: int) -> Tensor:
    return _squash(s, None, dim)


def squash_backward(grad: Tensor, s: Tensor, dim: int) -> Tensor:
    return _squash(s, grad, dim)


def predictions(u: Tensor, weight: Tensor) -> Tensor:
    u_hat = _empty(u, u.shape[0], *weight.shape[:3])
    _cuda.predictions(
        memory(u),
        memory(weight),
        memory(u_hat),
        u.shape[0],
        *weight.shape,
        _DTYPES[u.dtype],
        device := u.get_device(),
        _stream(device),
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
        device := u.get_device(),
        _stream(device),
    )
    return _or_empty(grad_u, u), _or_empty(grad_weight, u)


def _run(
    kernel: Callable[..., int],
    u: Tensor,
    tensors: tuple[Tensor | None, ...],
    options: tuple | None,
    settings: tuple,
    *missing: bool,
) -> None:
    """Queues the kernels of a call of routing, in one call into the extension.

    How much workspace a call takes is known from the one before with the same settings, and with the same
    tensors missing. A call that gets too little only returns how much it takes.
    """
    memories = [(0, 0) if x is None else (x.data_ptr(), x.nbytes) for x in tensors]
    dtype, device = u.dtype, u.get_device()
    tf32 = dtype is not torch.float32 or _allows_tf32()  # 16-bit numbers are exact in TF32
    key = kernel, dtype, device, tf32, options is None, settings, missing
    takes = _workspaces.get(key, 0)
    while True:
        workspace = _empty(u, -(-takes // u.itemsize))
        space = workspace.data_ptr(), workspace.nbytes
        takes = kernel(*memories, options, *settings, _DTYPES[dtype], tf32, space, device, _stream(device))
        if takes <= space[1]:
            return
        if len(_workspaces) >= _MOST_WORKSPACES:
            _workspaces.clear()
        _workspaces[key] = takes


def _route(
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: tuple | None,
    shape: tuple[int, ...],
    iterations: int,
    leaky: bool,
    squash_output: bool,
) -> tuple[Tensor, Tensor]:
    """v and s of all passes; `shape` is (B, I, J, D, K)."""
    batch, _, capsules, dim, _ = shape
    v = _empty(u, batch, capsules, dim)
    passes = max(iterations, 1)
    if u.dtype is torch.float32:  # with a dtype, new_empty() takes twice as long
        s = _empty(u, passes, batch, capsules, dim)
    else:
        s = _empty(u, passes, batch, capsules, dim, dtype=torch.float32)
    _run(
        _cuda.routing,
        u,
        (u, weight, bias, v, s),
        options,
        (*shape, iterations, leaky, squash_output),
        weight is None,
    )
    return v, s


def _route_backward(
    grad: Tensor,
    u: Tensor,
    weight: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    s: Tensor,
    shape: tuple[int, ...],
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    needs_u: bool,
    needs_weight: bool,
    needs_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """∂u (or ∂û), ∂W, ∂β and ∂logits; `shape` is (B, I, J, D, K)."""
    shared = u.dim() == 3 if weight is None else weight.dim() == 3
    grad_u = _like(u, needs_u)
    grad_weight = None if weight is None else _like(weight, needs_weight)
    grad_logits = None if logits is None else _like(logits, needs_logits)
    grad_bias = _empty(u, *shape[2:4])
    options = routing_options(logits, mask, shared, grad_logits)
    _run(
        _cuda.routing_backward,
        u,
        (grad, u, weight, s, grad_u, grad_weight, grad_bias),
        options,
        (*shape, iterations, leaky, detach, squash_output),
        weight is None,
        grad_u is None,
        grad_weight is None,
        grad_logits is None,
    )
    return _or_empty(grad_u, u), _or_empty(grad_weight, u), grad_bias, _or_empty(grad_logits, u)


def dynamic_routing(
    u_hat: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    squash_output: bool,
) -> tuple[Tensor, Tensor]:
    batch, in_capsules, *_, dim = u_hat.shape
    shape = batch, in_capsules, reference.out_capsules(u_hat, bias, logits), dim, 1
    options = routing_options(logits, mask, u_hat.dim() == 3)
    return _route(u_hat, None, bias, options, shape, iterations, leaky, squash_output)


def dynamic_routing_backward(
    grad: Tensor,
    u_hat: Tensor,
    logits: Tensor | None,
    mask: Tensor | None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    needs_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = *u_hat.shape[:2], *grad.shape[1:], 1
    settings = iterations, leaky, detach, squash_output
    grad_u_hat, _, grad_bias, grad_logits = _route_backward(
        grad, u_hat, None, logits, mask, s, shape, *settings, True, False, needs_logits
    )
    return grad_u_hat, grad_bias, grad_logits


def _shape(u: Tensor, weight: Tensor) -> tuple[int, ...]:
    sizes = *u.shape, *weight.shape
    return sizes[:2] + sizes[-3:]


def capsule_routing(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    squash_output: bool,
) -> tuple[Tensor, Tensor]:
    options = routing_options(logits, mask, weight.dim() == 3)
    return _route(u, weight, bias, options, _shape(u, weight), iterations, leaky, squash_output)


def capsule_routing_backward(
    grad: Tensor,
    u: Tensor,
    weight: Tensor,
    logits: Tensor | None,
    mask: Tensor | None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    squash_output: bool,
    needs_u: bool,
    needs_weight: bool,
    needs_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings = iterations, leaky, detach, squash_output
    return _route_backward(
        grad, u, weight, logits, mask, s, _shape(u, weight), *settings, needs_u, needs_weight, needs_logits
    )


def couplings(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
) -> Tensor:
    batch, in_capsules, capsules, _, _ = shape = _shape(u, weight)
    c = _empty(u, batch, in_capsules, capsules)
    if iterations <= 1 and logits is None:
        c = c.fill_(1 if iterations == 0 else 1 / (capsules + leaky))
        return c if mask is None else c.masked_fill_(~mask.unsqueeze(2), 0)
    options = routing_options(logits, mask, weight.dim() == 3)
    _run(
        _cuda.couplings,
        u,
        (u, weight, bias, c),
        options,
        (*shape, iterations, leaky),
    )
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
