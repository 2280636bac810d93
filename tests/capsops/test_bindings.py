"""capsops._cpu receives each tensor with its length and rejects what does not fit before any kernel runs."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import capsops
from tests.capsops.cases import Shape, layer_inputs, routing_inputs

_cpu = pytest.importorskip("capsops._cpu", reason="capsops._cpu is not built", exc_type=ImportError)
from capsops.backends import cpu  # noqa: E402  it needs the extension

SHAPE = Shape(2, 3, 4, 5, 6)
FUNCTIONS = (
    *("squash", "squash_backward", "predictions", "predictions_backward"),
    *("routing", "routing_backward", "couplings"),
)


class Recorder:
    """Records the calls of kernels."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*args: Any) -> None:
            self.calls.append((name, list(args)))
            getattr(_cpu, name)(*args)

        return call


def recorded() -> tuple[list[tuple[str, list[Any]]], list[torch.Tensor]]:
    """Calls of every kernel as the ops make them, and the tensors whose addresses they contain."""
    recorder, kept = Recorder(), []
    u, weight, bias = layer_inputs(SHAPE, bias=True, dtype=torch.float32)
    u_hat, _ = routing_inputs(SHAPE, dtype=torch.float32)
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_cpu", recorder)
        patch.setattr(torch, "empty_like", lambda *a, **k: keep(empty_like(*a, **k)))
        patch.setattr(torch.Tensor, "new_empty", lambda *a, **k: keep(new_empty(*a, **k)))
        cpu.squash_backward(keep(u.clone()), cpu.squash(u, 2), 2)
        cpu.predictions_backward(u_hat, u, weight, True, True)
        cpu.predictions(u, weight)
        v, s = cpu.capsule_routing(u, weight, bias, None, None, 3, False, True)
        cpu.capsule_routing_backward(v, u, weight, None, None, s, 3, False, False, True, True, True, False)
        v, s = cpu.dynamic_routing(u_hat, bias, None, None, 3, False, True)
        cpu.dynamic_routing_backward(v, u_hat, None, None, s, 3, False, False, True, False)
        cpu.couplings(u, weight, bias, None, None, 3, False)
    return recorder.calls, [*kept, u, weight, bias, u_hat]


CALLS, KEPT = recorded()


def test_every_kernel_is_called() -> None:
    assert {name for name, _ in CALLS} == set(FUNCTIONS)


@pytest.mark.parametrize(("name", "args"), CALLS, ids=[name for name, _ in CALLS])
def test_wrong_lengths_are_rejected(name: str, args: list[Any]) -> None:
    function = getattr(_cpu, name)
    function(*args)
    for n, memory in enumerate(args):
        if not isinstance(memory, tuple):
            continue
        address, size = memory
        wrong = [(address, size - 4), (address, size + 4), (address, -size), (address, 2**62), (0, size)]
        if size:  # only (0, 0) means that a tensor is left out
            wrong.append((address, 0))
        for other in wrong if size else [(0, 4), (64, 0), (64, 4)]:
            with pytest.raises(ValueError, match=r"^\w+: got -?\d+ (bytes at address|one without)"):
                function(*args[:n], other, *args[n + 1 :])


@pytest.mark.parametrize(("name", "args"), CALLS, ids=[name for name, _ in CALLS])
def test_wrong_sizes_are_rejected(name: str, args: list[Any]) -> None:
    """Each size one more, one less, not positive, and so large that the bytes are no 64-bit number."""
    function = getattr(_cpu, name)
    sizes = [n for n, x in enumerate(args) if type(x) is int][: 3 if "squash" in name else 5]
    precomputed = name.startswith("routing") and (0, 0) in args[1:3]  # predictions, whose K is not looked at
    for n in sizes[:4] if precomputed else sizes:
        for size in (args[n] + 1, args[n] - 1, 0, -1, -(2**62), 2**62):
            with pytest.raises(ValueError, match=r"^\w+: (got \d+ bytes|got sizes )"):
                function(*args[:n], size, *args[n + 1 :])


@pytest.mark.parametrize(("name", "args"), CALLS, ids=[name for name, _ in CALLS])
def test_dtype_and_threads(name: str, args: list[Any]) -> None:
    function = getattr(_cpu, name)
    function(*args[:-1], 4096)  # so little work uses only one of them
    for threads in (0, -1, 4097, 2**31 - 1):
        with pytest.raises(ValueError, match=rf"^threads: got {threads}, takes 1 to 4096$"):
            function(*args[:-1], threads)
    for dtype in (-1, 4, 100):
        with pytest.raises(ValueError, match=rf"^dtype: got {dtype}, takes 0 to 3$"):
            function(*args[:-2], dtype, args[-1])
    with pytest.raises(ValueError, match=r"^\w+: got \d+ bytes"):
        function(*args[:-2], 3, args[-1])  # float64 in place of float32


@pytest.mark.parametrize("name", ["routing", "routing_backward", "couplings"])
def test_iterations_out_of_range_are_rejected(name: str) -> None:
    for kernel, args in CALLS:
        if kernel == name:
            n = next(n for n, x in enumerate(args) if isinstance(x, bool)) - 1
            for iterations in (-1, 1001, 2**62):
                with pytest.raises(ValueError, match=rf"^iterations: got {iterations}, takes 0 to 1000$"):
                    getattr(_cpu, name)(*args[:n], iterations, *args[n + 1 :])


def test_couplings_of_one_pass_need_starting_logits() -> None:
    for kernel, args in CALLS:
        if kernel == "couplings":
            n = next(n for n, x in enumerate(args) if isinstance(x, bool)) - 1
            for iterations in (0, 1):
                with pytest.raises(
                    ValueError, match=rf"^iterations: got {iterations}, takes 2 or more without"
                ):
                    _cpu.couplings(*args[:n], iterations, *args[n + 1 :])


def test_couplings_take_a_weight() -> None:
    """Unlike routing, which takes predictions without a weight."""
    u_hat, couplings = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4)
    u_hat_memory, couplings_memory = ((x.data_ptr(), x.nbytes) for x in (u_hat, couplings))
    with pytest.raises(ValueError, match="^weight: got none, takes one$"):
        _cpu.couplings(u_hat_memory, (0, 0), (0, 0), couplings_memory, None, 2, 3, 4, 5, 1, 3, False, 0, 1)


# Starting logits, a mask and shared predictions: the one argument of a kernel that is a tuple of six.


def recorded_with_options() -> tuple[list[tuple[str, list[Any]]], list[torch.Tensor]]:
    """Calls of the kernels of routing with options, and the tensors whose addresses they contain."""
    u, weight, bias = layer_inputs(SHAPE, bias=True, dtype=torch.float32)
    logits, mask = torch.randn(1, 3, 4), torch.ones(2, 3) > 0
    recorder, kept = Recorder(), [u, weight, bias, logits, mask]

    def keeping(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **options: Any) -> torch.Tensor:
            kept.append(function(*args, **options))
            return kept[-1]

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_cpu", recorder)
        patch.setattr(torch, "empty_like", keeping(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", keeping(torch.Tensor.new_empty))
        kept.append(shared := weight[0].contiguous())
        options = logits, mask, 3, False
        v, s = cpu.capsule_routing(u, shared, bias, *options, True)
        needs = False, True, True, True, True
        cpu.capsule_routing_backward(v, u, shared, logits, mask, s, 3, False, *needs)
        cpu.couplings(u, shared, bias, *options)
        kept.append(u_hat := torch.randn(2, 3, 5))
        v, s = cpu.dynamic_routing(u_hat, bias, *options, True)
        cpu.dynamic_routing_backward(v, u_hat, logits, mask, s, 3, False, False, True, True)
    return recorder.calls, kept


OPTION_CALLS, OPTIONS_KEPT = recorded_with_options()


@pytest.mark.parametrize(("name", "args"), OPTION_CALLS, ids=[name for name, _ in OPTION_CALLS])
def test_wrong_options_are_rejected(name: str, args: list[Any]) -> None:
    """Memory that is too short, sizes that do not fit the capsules, and strides that leave the memory."""
    function = getattr(_cpu, name)
    function(*args)
    n = next(n for n, x in enumerate(args) if isinstance(x, tuple) and len(x) == 6)
    shared, mask, (address, size), sizes, strides, grad = args[n]
    assert (shared, sizes, strides) == (True, (1, 3, 4), (12, 4, 1))
    logits, huge = (address, size), 2**62
    wrong = [
        *((shared, other, logits, sizes, strides, grad) for other in ((mask[0], 5), (mask[0], 0), (0, 6))),
        *((shared, mask, (address, other), sizes, strides, grad) for other in (0, 4, size - 4, -size)),
        (shared, mask, (0, size), sizes, strides, grad),
        *(
            (shared, mask, logits, other, strides, grad)
            for other in ((3, 3, 4), (1, 2, 4), (1, 3, 5), (0, 3, 4), (-1, 3, 4), (1, 3, huge))
        ),
        *(
            (shared, mask, logits, sizes, other, grad)
            for other in ((12, 5, 1), (12, 4, 2), (12, -4, 1), (12, 4, -1), (12, huge, 1), (12, 4, huge))
        ),
        (shared, mask, logits, (2, 3, 4), (huge, 4, 1), grad),
        (shared, mask, logits, (2, 3, 4), (12, 4, 1), grad),
        *((shared, mask, logits, sizes, strides, other) for other in ((address, 4), (address, 52), (64, 0))),
        (False, mask, logits, sizes, strides, grad),  # the predictions are too short for each of the capsules
    ]
    for other in wrong:
        with pytest.raises(ValueError, match=r"^\w+: got "):
            function(*args[:n], other, *args[n + 1 :])
    if grad != (0, 0):
        with pytest.raises(ValueError, match="^grad_logits: got one without logits$"):
            function(*args[:n], (shared, mask, (0, 0), sizes, strides, grad), *args[n + 1 :])


def test_use_isa() -> None:
    before = _cpu.isa()
    try:
        for isa in _cpu.isas():
            _cpu.use_isa(isa)
            assert _cpu.isa() == isa
    finally:
        _cpu.use_isa(before)
    with pytest.raises(ValueError, match="^CAPSOPS_CPU_ISA: got 'mmx', takes one of baseline"):
        _cpu.use_isa("mmx")


def test_1000_iterations_are_accepted() -> None:
    v = capsops.dynamic_routing(torch.ones(1, 2, 2, 1), iterations=1000, impl="cpu")
    torch.testing.assert_close(v, torch.full((1, 2, 1), 0.5))


def test_sizes_of_0_are_rejected_even_if_the_bytes_fit() -> None:
    for sizes in ((0, 3, 1), (3, 0, 1), (3, 1, 0)):
        with pytest.raises(
            ValueError, match=rf"^s: got sizes {re.escape(str(list(sizes)))}, takes positive ones"
        ):
            _cpu.squash((64, 0), (64, 0), *sizes, 0, 1)


def test_benchmark_loop_rejects_invalid_arguments() -> None:
    for seconds in (-1.0, 0.0, float("nan"), float("inf"), 1e9):
        with pytest.raises(ValueError, match="^seconds: takes"):
            _cpu.fma_flops(seconds, 1)
    with pytest.raises(ValueError, match="^threads: got 0"):
        _cpu.fma_flops(0.001, 0)


def test_the_ops_pass_lengths_that_fit() -> None:
    """Inputs that are not contiguous raise none of the errors above."""
    u, weight, bias = layer_inputs(SHAPE, bias=True, dtype=torch.float32)
    wide = torch.stack([u, u], -1)[..., 0]
    torch.testing.assert_close(
        capsops.capsule_routing(wide, weight.transpose(0, 1).contiguous().transpose(0, 1), bias, impl="cpu"),
        capsops.capsule_routing(u, weight, bias, impl="reference"),
    )
