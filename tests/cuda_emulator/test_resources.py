"""Registers, memory and machine code of the CUDA kernels, read from the installed extension."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ARCHS = ("sm_80", "sm_90")


def disassembler() -> str:
    """cuobjdump, either Triton's or that of the CUDA toolkit."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        if bundled.exists():
            return str(bundled)
    return shutil.which("cuobjdump") or pytest.skip("cuobjdump is not installed")


def dump(*options: str) -> str:
    spec = importlib.util.find_spec("capsops._cuda")
    if spec is None or spec.origin is None:
        pytest.skip("capsops._cuda is not built")
    command = [disassembler(), *options, spec.origin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", params=ARCHS)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def resources(arch: str) -> dict[str, dict[str, int]]:
    """Registers, stack, shared and local memory of each kernel."""
    kernels = {}
    for name, numbers in re.findall(
        r"Function (\S+):\s*\n(.*)", dump("--dump-resource-usage", "-arch", arch)
    ):
        kernels[name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
    return kernels


@pytest.fixture(scope="module")
def instructions(arch: str) -> dict[str, list[str]]:
    """The instructions of each function, without operands and predicates."""
    functions = re.split(r"\n\s*Function : ", dump("--dump-sass", "-arch", arch))
    pattern = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", re.MULTILINE)
    return {text.split(maxsplit=1)[0]: pattern.findall(text) for text in functions[1:]}


def test_every_kernel_is_compiled(resources: dict[str, dict[str, int]]) -> None:
    """Each kernel once for every template argument that it is compiled with.

    Passes, forward and backward: in float32 and in TF32 3 sizes of D for any K, one of them also for few
    output capsules, and both for K of at most 8; in 16 bit these 4 for any K and for at most 8. Over
    precomputed predictions: 3 sizes of D, 3 dtypes.
    Gradients: 5 for each way to multiply and each dtype. smem_cached: 3 sizes of D, J 10 or less, 3 dtypes.
    """
    names = " ".join(resources)
    passes = 2 * (2 * 6 + 2 * 8)
    assert names.count("passes_kernel") == passes + 18
    assert names.count("precomputed_passes_kernel") == 18
    assert names.count("gradients_kernel") == 35
    assert names.count("smem_cached_kernel") == 18
    for kernel in ("squash_kernel", "predictions_kernel", "sums_kernel", "grad_bias_kernel"):
        assert kernel in names


def test_no_spills_and_no_stack(resources: dict[str, dict[str, int]]) -> None:
    for name, numbers in resources.items():
        assert numbers["STACK"] == 0, name
        assert numbers["LOCAL"] == 0, name


def test_registers_let_the_planned_blocks_run(resources: dict[str, dict[str, int]]) -> None:
    """A multiprocessor has 65536 registers, which warps are allocated in units of 256."""
    for name, numbers in resources.items():
        warps = 12 if re.search("precomputed_passes_|gradients_|smem_cached_", name) else 8
        if "gradients_kernel" in name and "MultiplyAdds" in name:
            warps = 8
        registers = -(-numbers["REG"] // 8) * 8
        assert registers * 32 * warps <= 65536, f"{name}: {numbers['REG']} registers, {warps} warps"


def test_no_local_memory_in_the_machine_code(instructions: dict[str, list[str]]) -> None:
    for name, code in instructions.items():
        local = {op for op in code if op.split(".")[0] in ("LDL", "STL")}
        assert not local, f"{name}: {local}"


def test_tensor_cores(instructions: dict[str, list[str]]) -> None:
    """Kernels for tensor cores, and no others, use the intended instructions; copies are asynchronous."""
    fused = {
        name: code
        for name, code in instructions.items()
        if re.search("passes_|gradients_|smem_cached_", name)
    }
    assert len(fused) == 2 * (2 * 6 + 2 * 8) + 18 + 35 + 18
    for name, code in fused.items():
        copies = any(op.startswith("LDGSTS") for op in code)
        assert copies != ("gradients_" in name and "Precomputed" in name), f"{name}: asynchronous copies?"
        matrix = {op for op in code if op.startswith("HMMA")}
        expected = set()
        if "Tf32" in name or "Float32Products" in name:
            expected = {"HMMA.1688.F32.TF32"}
        elif "Products" in name:
            depth = "1688" if "Shallow" in name else "16816"
            expected = {f"HMMA.{depth}.F32{'.BF16' if 'bfloat16' in name else ''}"}
        elif "SixteenBit" in name:
            kind = ".BF16" if "bfloat16" in name else ""
            expected = {f"HMMA.16816.F32{kind}", f"HMMA.1688.F32{kind}"}
            if "gradients_" in name and not kind:
                expected.add("HMMA.1688.F32.TF32")
        elif cached := re.search("smem_cached_kernelI(13__nv_bfloat16|6__half)Li4E", name):
            expected = {f"HMMA.16816.F32{'.BF16' if 'bfloat16' in cached.group(1) else ''}"}
        assert matrix == expected, name
