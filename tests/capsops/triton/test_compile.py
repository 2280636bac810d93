"""Every kernel compiles for every target, without a GPU, and uses the resources that it should.

Triton's interpreter (TRITON_INTERPRET) compiles nothing.
"""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton", minversion="3.6", reason="Triton 3.6 or newer is not installed")

from benchmarks.triton_compile import SHARED_LIMIT, TARGETS, compiling, resources  # noqa: E402
from benchmarks.triton_resources import CLASSES, PRECISIONS, launches, option_launches, rows  # noqa: E402
from capsops.backends import BACKENDS  # noqa: E402
from capsops.backends.triton.launch import unit  # noqa: E402
from capsops.measuring.cases import Case  # noqa: E402

if triton.knobs.runtime.interpret:
    pytest.skip("Triton's interpreter is on", allow_module_level=True)

KERNELS = SimpleNamespace(**BACKENDS["triton"].functions)

# Kernels with matrix products; the others only add and multiply element by element.
PRODUCTS = {
    "predictions",
    "predictions_gradient_u",
    "predictions_gradient_w",
    "uniform_product s",
    "uniform_product u",
    "uniform_product w",
    "routed_pass",
    "routed_pass gradient",
    "routed_gradient needs_u needs_w",
    "couplings",
}
OTHERS = {
    "squash",
    "squash gradient",
    "precomputed_pass",
    "precomputed_pass uniform",
    "precomputed_pass gradient",
    "precomputed_gradient",
    "finish_pass",
    "finish_reduction",
}
OPTIONS_ONLY = {
    "shared_pass",
    "shared_gradient",
    "shared_logits",
    "shared_couplings",
    "precomputed_logits",
}
FAST = {("MNIST", "float32, TF32 allowed", "sm_90"), ("odd", "bfloat16", "gfx942")}


@pytest.mark.parametrize(
    ("shape", "name", "target"),
    [
        pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
        for case in product(CLASSES, PRECISIONS, TARGETS)
    ],
)
def test_resources(shape: str, name: str, target: str) -> None:
    kernels = set()
    for *_, compiled, used in rows([shape], [name], [target]):
        title = compiled.title
        kernels.add(title)
        assert used.shared <= SHARED_LIMIT[target], title
        assert used.instructions.total() > 50, f"{title}: the disassembly was not understood"
        if target == "sm_90":
            assert (used.spills, used.stack) == (0, 0), title
        matrix_unit = title in PRODUCTS and (name != "float32" or target == "gfx942")  # AMD's takes float32
        assert (used.tensor_core > 0) == matrix_unit, f"{title}: {used.tensor_core}"
    assert kernels == PRODUCTS | OTHERS


@pytest.mark.parametrize(
    ("shape", "name", "target"),
    [
        pytest.param(*case, marks=() if case == ("odd", "bfloat16", "sm_80") else pytest.mark.slow)
        for case in product(CLASSES, PRECISIONS, TARGETS)
    ],
)
def test_resources_of_the_options(shape: str, name: str, target: str) -> None:
    """Logits, masks, shared weights and s itself: as test_resources."""
    kernels = set()
    for compiled in option_launches(CLASSES[shape], name, target):
        used = resources(compiled)
        kernels.add(compiled.kernel.removesuffix("_kernel"))
        assert used.shared <= SHARED_LIMIT[target], compiled.title
        if target == "sm_90":
            assert (used.spills, used.stack) == (0, 0), compiled.title
    assert kernels >= OPTIONS_ONLY | {"routed_pass", "routed_gradient", "precomputed_pass", "couplings"}


@pytest.mark.parametrize(
    ("leaky", "detach"),
    [(False, False), (True, True), *(pytest.param(x, not x, marks=pytest.mark.slow) for x in (False, True))],
)
def test_sizes_of_one_compile(leaky: bool, detach: bool) -> None:
    """Triton compiles an argument that is 1 as a constant, which lacks methods of a number."""
    launched = launches(Case(1, 1, 1, 1, 1), "float32", "sm_90", leaky=leaky, detach=detach)
    kernels = {f"{kernel.split()[0]}_kernel" for kernel in PRODUCTS | OTHERS}
    assert {launch.kernel for launch in launched} == kernels
    assert {launch.options.get("LEAKY") for launch in launched} == {None, leaky}


@pytest.mark.parametrize(("inputs", "spills"), [(8, False), (32, True)])
def test_spills_are_counted(inputs: int, spills: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the larger tile needs more registers than there are."""
    from capsops.backends.triton import launch_configs

    monkeypatch.setattr(
        launch_configs, "tile", lambda *sizes: launch_configs.Tile(64, inputs, 16, 8, 4, 1, None)
    )
    u, weight = torch.empty(64, 32, 8, device="meta"), torch.empty(32, 10, 16, 8, device="meta")
    with compiling("sm_90", tf32=True) as launched:
        KERNELS.couplings(u, weight, None, None, None, 2, False)
    assert (resources(launched[-1]).spills > 0) == spills


def test_the_settings_of_torch_decide_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    try:
        for setting, wanted in (
            ("highest", "ieee"),
            ("high", "tf32"),
            ("medium", "tf32"),
            ("highest", "ieee"),
        ):
            torch.set_float32_matmul_precision(setting)
            assert unit(x) == wanted, setting
        for allowed in (True, False):
            matmul.allow_tf32 = allowed
            assert unit(x) == ("tf32" if allowed else "ieee")
        if hasattr(matmul, "fp32_precision"):
            for setting in ("tf32", "ieee"):
                matmul.fp32_precision = setting
                assert unit(x) == setting
        torch.set_float32_matmul_precision("high")
        monkeypatch.setattr(torch.version, "hip", "6.0")
        assert unit(x) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_units_of_16_bit_do_not_depend_on_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    brain, half = torch.zeros(1).bfloat16(), torch.zeros(1).half()
    assert (unit(brain), unit(half)) == ("bf16", "tf32")
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert (unit(brain), unit(half)) == ("bf16", "ieee")


def test_nothing_is_launched_while_compiling() -> None:

    with compiling("sm_90") as launched:
        KERNELS.squash(torch.empty(3, 4, device="meta"), 1)
    (launch,) = launched
    assert launch.kernel == "squash_kernel"
    assert launch.artifact.asm["cubin"]


class SizeRecorder(TorchDispatchMode):
    """Records the number of elements of every tensor that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = op(*args, **(kwargs or {}))
        self.sizes += [x.numel() for x in pytree.tree_leaves(results) if isinstance(x, Tensor)]
        return results


@pytest.mark.parametrize(("B", "share"), [(1024, 1 / 16), (16, 1 / 2)])
@pytest.mark.parametrize("K", [8, 300])
@pytest.mark.parametrize("detach", [False, True])
def test_predictions_are_not_stored(
    B: int, share: float, K: int, detach: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apart from results, no tensor is nearly as large as û or, in a large batch, as the couplings."""

    monkeypatch.setattr(triton.JITFunction, "run", lambda *args, **options: None)
    I, J, D = 1152, 32, 16  # noqa: E741
    u, weight, grad, u_hat = (
        torch.empty(n, device="meta") for n in ((B, I, K), (I, J, D, K), (B, J, D), (B, I, J, D))
    )
    with SizeRecorder() as recorder:
        v, s = KERNELS.capsule_routing(u, weight, None, None, None, 3, False, True)
        gradients = KERNELS.capsule_routing_backward(
            grad, u, weight, None, None, s, 3, False, detach, True, True, True, False
        )
    results = {x.numel() for x in (v, s, *gradients)}
    assert results <= set(recorder.sizes)
    assert max(size for size in recorder.sizes if size not in results) < u_hat.numel() * share
    with SizeRecorder() as recorder:
        KERNELS.couplings(u, weight, None, None, None, 3, False)
    assert B * I * J in recorder.sizes
    assert max(recorder.sizes) <= u_hat.numel() * share
    with SizeRecorder() as recorder:
        KERNELS.dynamic_routing_backward(grad, u_hat, None, None, s, 3, False, detach, True, False)
    assert u_hat.numel() in recorder.sizes


@pytest.mark.parametrize("axes", ["IJ", "J"])
@pytest.mark.parametrize("op", ["layer", "shared", "stored"])
def test_the_gradient_of_logits_that_samples_share_is_not_stored_by_pair(
    op: str, axes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.JITFunction, "run", lambda *args, **options: None)
    B, I, J, D, K = 1024, 1152, 32, 16, 8  # noqa: E741
    logits = torch.empty(1, I if "I" in axes else 1, J, device="meta")
    u, grad, u_hat = (torch.empty(n, device="meta") for n in ((B, I, K), (B, J, D), (B, I, J, D)))
    weight = torch.empty((J, D, K) if op == "shared" else (I, J, D, K), device="meta")
    mask = torch.empty(B, I, dtype=torch.bool, device="meta")
    with SizeRecorder() as recorder:
        if op == "stored":
            _, s = KERNELS.dynamic_routing(u_hat, None, logits, mask, 3, False, True)
            *_, grad_logits = KERNELS.dynamic_routing_backward(
                grad, u_hat, logits, mask, s, 3, False, False, True, True
            )
        else:
            _, s = KERNELS.capsule_routing(u, weight, None, logits, mask, 3, False, True)
            *_, grad_logits = KERNELS.capsule_routing_backward(
                grad, u, weight, logits, mask, s, 3, False, False, True, True, True, True
            )
    assert grad_logits.shape == logits.shape
    largest = max(size for size in recorder.sizes if size not in (u.numel(), u_hat.numel(), weight.numel()))
    assert largest < B * I * J / 4
