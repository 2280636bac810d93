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

from benchmarks.triton_compile import SHARED_LIMIT, TARGETS, compiling, resources, room  # noqa: E402
from benchmarks.triton_resources import CLASSES, PRECISIONS, launches, option_launches, rows  # noqa: E402
from capsops.backends import BACKENDS  # noqa: E402
from capsops.backends.triton import launch_configs  # noqa: E402
from capsops.backends.triton.capsule_routing import Layer  # noqa: E402
from capsops.backends.triton.launch import launch, unit  # noqa: E402
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
    assert {one.kernel for one in launched} == kernels
    assert {one.options.get("LEAKY") for one in launched} == {None, leaky}


@pytest.mark.parametrize(("inputs", "spills"), [(8, False), (32, True)])
def test_spills_are_counted(inputs: int, spills: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the larger tile needs more registers than there are."""
    monkeypatch.setattr(
        launch_configs, "tile", lambda *sizes: launch_configs.Tile(64, inputs, 16, 8, 4, 1, None, 2)
    )
    u, weight = torch.empty(64, 32, 8, device="meta"), torch.empty(32, 10, 16, 8, device="meta")
    with compiling("sm_90", tf32=True) as launched:
        KERNELS.couplings(u, weight, None, None, None, 2, False)
    assert (resources(launched[-1]).spills > 0) == spills


# The least share of the room of its waves that a launch takes, from 128 samples on. The gradient has one part
# of all samples where more would cost much memory, and float16 has no block of 168 registers that does not
# spill.
FILLED = {"routed_pass": 0.72, "routed_gradient": 0.54, "uniform_product": 0.54}
PROCESSORS = 132


@pytest.mark.parametrize(
    "name",
    [x if x == "float32, TF32 allowed" else pytest.param(x, marks=pytest.mark.slow) for x in PRECISIONS],
)
def test_launches_fill_whole_waves(name: str) -> None:
    """The layer of the paper on an H100 or H200: the room that the tables state is there, waves are full.

    Up to 16 samples are one wave, in which no multiprocessor has more than three programs.
    """
    dtype, tf32 = PRECISIONS[name]
    rooms: dict[int, int] = {}
    for B in (1, 16, 128, 512, 1024):
        u, weight, grad = (
            torch.empty(n, dtype=dtype, device="meta") for n in ((B, 1152, 8), (1152, 10, 16, 8), (B, 10, 16))
        )
        with compiling("sm_90", tf32) as launched:
            layer = Layer(u, weight, None, None, 3, False)
            _, s = KERNELS.capsule_routing(u, weight, None, None, None, 3, False, True)
            KERNELS.capsule_routing_backward(
                grad, u, weight, None, None, s, 3, False, False, True, True, True, False
            )
        stated = {
            "routed_pass": layer.routed_tile().resident,
            "routed_gradient": layer.routed_tile(gradient=True).resident,
            "uniform_product": 3,
        }
        for one in launched:
            kernel = one.kernel.removesuffix("_kernel")
            if kernel not in stated:
                continue
            key = id(one.artifact)
            if key not in rooms:
                rooms[key] = room(resources(one), one.options["num_warps"])
            assert rooms[key] >= stated[kernel], (B, one.title)
            slots = PROCESSORS * stated[kernel]
            waves = -(-one.programs // slots)
            if B <= 16:
                assert one.programs <= min(slots, 3 * PROCESSORS), (B, one.title)
            else:
                least = 0.54 if name == "float16" else FILLED[kernel]
                assert one.programs >= least * waves * slots, (B, one.title, one.programs)


def test_a_split_keeps_the_busiest_multiprocessor_busy_for_the_shortest_time() -> None:
    """Two tiles of samples of 144 blocks each, on 132 multiprocessors: by hand."""
    x = torch.empty(1, device="meta")
    assert launch_configs.split(144, 2, x, 3) == (144, 1)  # 288 programs in one wave
    assert launch_configs.split(144, 2, x, 2) == (144, 1)  # 2 waves of one block, or 1 of two, as long
    assert launch_configs.split(144, 8, x, 2) == (29, 5)  # one wave of 232, where 33 parts would be 4.4 each
    assert launch_configs.split(5, 1, x, 2) == (5, 1)
    assert launch_configs.split(100, 1000, x, 2) == (1, 100)
    assert launch_configs.split(100, 1, x, 2, multiple=16) == (7, 16)
    assert launch_configs.split(100, 1, x, 2, multiple=16, least=64) == (1, 112)


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
    (squash,) = launched
    assert squash.kernel == "squash_kernel"
    assert squash.artifact.asm["cubin"]


class Fails:
    """A kernel whose launch fails."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: object, **options: object) -> None:
            raise ValueError("the driver refuses")

        return run


def test_a_launch_that_fails_in_a_capture_names_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"CUDA graph is being captured.*capsops\.warm_up") as caught:
        launch(Fails(), 1)
    assert isinstance(caught.value.__cause__, ValueError)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(ValueError, match="the driver refuses"):
        launch(Fails(), 1)


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
