"""The launches of Triton's kernels for a call of routing, compiled ahead of time for sm_90."""

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import capsops
from benchmarks.gpu import sass
from benchmarks.gpu.launches import FORWARD
from benchmarks.gpu.walk import Launch
from benchmarks.triton_compile import Compiled, compiling
from capsops.measuring.cases import Case
from capsops.measuring.precisions import PRECISIONS

_SIZES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "u32": 4, "i64": 8, "u64": 8, "fp32": 4}
_NAMES = {"tf32": "float32, TF32 allowed", "bfloat16": "bfloat16", "float32": "float32"}


def _calls(op: str, precision: str, case: Case) -> list[Compiled]:
    """The launches of one call, in their order."""
    dtype, tf32 = PRECISIONS[_NAMES[precision]]
    B, _, J, D, _ = case.sizes
    u, weight, bias, grad = (
        torch.empty(n, dtype=dtype, device="meta") for n in (*case.shapes_of_layer, (J, D), (B, J, D))
    )
    s = torch.empty(case.iterations, B, J, D, device="meta")
    kernels = SimpleNamespace(**capsops.dispatch.BACKENDS["triton"].functions)
    with compiling("sm_90", tf32) as launched:
        if op == FORWARD:
            kernels.capsule_routing(u, weight, bias, None, None, case.iterations, False, True)
        else:
            kernels.capsule_routing_backward(
                grad, u, weight, None, None, s, case.iterations, False, False, True, True, True, False
            )
    return launched


def _parameters(launched: Compiled, size: int) -> bytes:
    """What the launch passes, each value aligned to its size, and unused addresses of Triton's own."""
    source, pointer = launched.artifact.src, 1 << 40
    values: dict[str, Any] = dict(zip(source.fn.arg_names, launched.arguments, strict=False))
    values |= launched.options
    packed = bytearray()
    for name, kind in source.signature.items():
        if kind == "constexpr":
            continue
        width = 8 if kind.startswith("*") else _SIZES[kind]
        packed += bytes(-len(packed) % width)
        if kind.startswith("*"):
            pointer += 1 << 32
            packed += pointer.to_bytes(8, "little")
        elif kind == "fp32":
            packed += bytes(torch.tensor([float(values[name])]).numpy().tobytes())
        else:
            packed += int(values[name]).to_bytes(width, "little", signed=kind.startswith("i"))
    return bytes(packed).ljust(size, b"\0")


def with_kernels(op: str, precision: str, case: Case) -> list[tuple[Launch, sass.Function, sass.Usage]]:
    """Each launch with its kernel's machine code."""
    result = []
    for launched in _calls(op, precision, case):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(launched.artifact.asm["cubin"])
            file.flush()
            functions, usages = sass.functions(Path(file.name)), sass.usages(Path(file.name))
        ((name, function),) = functions.items()
        threads = launched.artifact.metadata.num_warps * 32
        launch = Launch(
            f"triton {launched.title}",
            launched.programs,
            threads,
            launched.artifact.metadata.shared,
            _parameters(launched, usages[name].parameters),
        )
        result.append((launch, function, usages[name]))
    return result
