"""What a backend is: one record of the tensors and options that it supports, and a function for each op."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from capsops.backends.device import Device

# Options of routing that a backend may lack, named as an error shows them.
UNSQUASHED = "squash_output=False"
LOGITS = "logits"
MASK = "mask"
SHARED = "shared weights or predictions"  # weight [J, D, K], û [B, I, D]

NO_OPTIONS: frozenset[str] = frozenset()
ALL_OPTIONS = frozenset((UNSQUASHED, LOGITS, MASK, SHARED))


def _runs_anywhere(device: Device) -> str:
    return ""


def _unknown(device: Device) -> str:
    return "unknown"


@dataclass(frozen=True, eq=False)
class Backend:
    """Computes the ops.

    Tensors that its functions receive are not empty, have one dtype and one device, fit one another, and are
    contiguous but for `logits`. Tensors that they return are contiguous and share no memory with those. s is
    sᵗ of every pass, [max(T, 1), B, J, D], in the accumulation dtype. With squash_output=False v is sᵗ of the
    last pass. A gradient that is not needed is an empty tensor.

    weight is [I, J, D, K], or [J, D, K] where all input capsules share it. û is [B, I, J, D], or [B, I, D]
    where it is the same for all output capsules. logits has three axes, of sizes B or 1, I or 1, J or 1, and
    any strides; ∂logits has its shape. mask is [B, I], True where an input capsule is present.

        squash(s, dim) -> v
        squash_backward(grad, s, dim) -> ∂s
        predictions(u, weight) -> û
        predictions_backward(grad, u, weight, needs_u, needs_weight) -> ∂u, ∂W
        dynamic_routing(u_hat, bias, logits, mask, iterations, leaky, squash_output) -> v, s
        dynamic_routing_backward(
            grad, u_hat, logits, mask, s, iterations, leaky, detach, squash_output, needs_logits
        ) -> ∂û, ∂β, ∂logits
        capsule_routing(u, weight, bias, logits, mask, iterations, leaky, squash_output) -> v, s
        capsule_routing_backward(
            grad, u, weight, logits, mask, s, iterations, leaky, detach, squash_output, needs_u, needs_weight,
            needs_logits
        ) -> ∂u, ∂W, ∂β, ∂logits
        couplings(u, weight, bias, logits, mask, iterations, leaky) -> c

    Attributes:
        name: what `impl` calls it.
        functions: those of the ops that it computes, by name; one for the gradient where the op has one.
        devices: types of the devices whose tensors it takes; empty where it takes any.
        dtypes: dtypes of the tensors that it takes.
        options: options of routing that it supports.
        unavailable: why it cannot be used in this process; empty where it can.
        needs_proof: whether impl="auto" takes it only on devices on which its kernels have been proved.
        why_not_on: why its kernels cannot run on a device; empty where they can.
        kernels: names its kernels as compiled for a device: by their sources, and by what compiles them where
            that counts. A proof that ships is about kernels of one such name.
        compiles: whether a kernel is compiled when it is first called with other sizes, which takes a second.
        code: a hash of what runs, on host and device. A proof in the user's cache is about one such hash.
    """

    name: str
    functions: Mapping[str, Callable]
    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    options: frozenset[str] = NO_OPTIONS
    unavailable: str = ""
    needs_proof: bool = False
    why_not_on: Callable[[Device], str] = _runs_anywhere
    kernels: Callable[[Device], str] = _unknown
    compiles: bool = False
    code: Callable[[], str] = lambda: "unknown"

    def takes_device(self, device: str) -> bool:
        return not self.devices or device in self.devices

    def why_declined(self, op: str, dtype: torch.dtype, options: frozenset[str]) -> str:
        """Why it cannot compute an op on tensors of this dtype with these options; empty where it can."""
        if op not in self.functions:
            return f"impl={self.name!r} does not compute {op}"
        if dtype not in self.dtypes:
            takes = ", ".join(str(each).removeprefix("torch.") for each in self.dtypes)
            got = str(dtype).removeprefix("torch.")
            return f"impl={self.name!r} takes tensors of {takes}, got {got}"
        if not options <= self.options:
            missing = ", ".join(sorted(options - self.options))
            return f"impl={self.name!r} does not support {missing}"
        return ""


def by_name(*functions: Callable) -> dict[str, Callable]:
    return {function.__name__: function for function in functions}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of a dtype are summed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
