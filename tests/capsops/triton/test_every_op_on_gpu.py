"""What test_every_op_on_gpu.py compares of the Triton kernels: how many compile, and that none is missing.

The kernels are launched on tensors without memory, and compile nothing: Triton only says what it would.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest

triton = pytest.importorskip("triton", minversion="3.6", reason="Triton 3.6 or newer is not installed")

from benchmarks.triton_compile import compiling  # noqa: E402
from capsops.backends import BACKENDS  # noqa: E402
from capsops.backends.triton import launch_configs  # noqa: E402
from capsops.measuring.precisions import PRECISIONS  # noqa: E402
from tests.capsops.test_every_op_on_gpu import comparisons, for_triton, option_comparisons  # noqa: E402

if triton.knobs.runtime.interpret:
    pytest.skip("Triton's interpreter is on", allow_module_level=True)

KERNELS = SimpleNamespace(**BACKENDS["triton"].functions)
MOST_KERNELS = 600


def launch(
    op: str, first: tuple, bias: Any = None, logits: Any = None, mask: Any = None, iterations: int = 3,
    leaky: bool = False, detach: bool = False, squash_output: bool = True, dim: int = -1,
) -> None:  # fmt: skip
    """What the op launches forward and backward, where every input requires a gradient."""
    has_logits = logits is not None
    if has_logits and logits.dim() == 2:
        logits = logits.unsqueeze(0)
    if op == "squash":
        KERNELS.squash_backward(KERNELS.squash(*first, dim % 3), *first, dim % 3)
    elif op == "predictions":
        KERNELS.predictions_backward(KERNELS.predictions(*first), *first, True, True)
    elif op == "couplings":
        KERNELS.couplings(*first, bias, logits, mask, iterations, leaky)
    elif op == "dynamic_routing":
        v, s = KERNELS.dynamic_routing(*first, bias, logits, mask, iterations, leaky, squash_output)
        KERNELS.dynamic_routing_backward(
            v, *first, logits, mask, s, iterations, leaky, detach, squash_output, has_logits
        )
    else:
        v, s = KERNELS.capsule_routing(*first, bias, logits, mask, iterations, leaky, squash_output)
        KERNELS.capsule_routing_backward(
            v, *first, logits, mask, s, iterations, leaky, detach, squash_output, True, True, has_logits
        )


class Recorded:
    """The kernels that would compile, and the entries of launch_configs that made their blocks."""

    def __init__(self) -> None:
        self.kernels: set[tuple[str, str]] = set()
        self.entries: set[tuple[str, str]] = set()

    def hook(self, *, key: str, fn: Any, **rest: object) -> bool:
        self.kernels.add((fn.name, key))
        return True  # nothing compiles


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Recorded]]:
    """A function that launches all that is compared in a precision."""

    def recorded(precision: str) -> Recorded:
        dtype, tf32 = PRECISIONS[precision]
        result = Recorded()

        class Table(dict):
            def __getitem__(self, key: str) -> launch_configs.Entry:
                result.entries.add((self.name, key))
                return super().__getitem__(key)

        for name, entries in tables.items():
            table = Table(entries)
            table.name = name
            monkeypatch.setattr(launch_configs, name, table)
        with compiling("sm_90", tf32):
            monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", result.hook)
            for selection in for_triton(precision):
                for one in chain(
                    comparisons("triton", dtype, selection, "meta"),
                    option_comparisons("triton", dtype, selection, "meta"),
                ):
                    launch(one.op, **one.arguments)
        return result

    tables = {name: getattr(launch_configs, name) for name in ("ROUTED", "GRADIENT")}
    yield recorded
    monkeypatch.undo()


def test_few_kernels_compile(record: Callable[[str], Recorded]) -> None:
    kernels = set().union(*(record(precision).kernels for precision in PRECISIONS))
    assert 200 < len(kernels) < MOST_KERNELS


def test_every_entry_of_the_tables_is_compared(record: Callable[[str], Recorded]) -> None:
    entries = set().union(*(record(precision).entries for precision in PRECISIONS))
    wanted = {(name, key) for name in ("ROUTED", "GRADIENT") for key in getattr(launch_configs, name)}
    assert entries == wanted


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_kernel_is_compared_in_every_precision(
    precision: str, record: Callable[[str], Recorded]
) -> None:
    from capsops.backends.triton import (
        capsule_routing,
        couplings,
        dynamic_routing,
        predictions,
        reductions,
        shared_routing,
        squash,
    )

    modules = (capsule_routing, couplings, dynamic_routing, predictions, reductions, shared_routing, squash)
    names = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {name.rpartition(".")[2] for name, _ in record(precision).kernels} == names
