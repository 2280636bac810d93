"""What a check compares of the Triton kernels: how many compile, and that none is missing.

The kernels are launched on tensors without memory, and compile nothing: Triton only says what it would.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

triton = pytest.importorskip("triton", minversion="3.6", reason="Triton 3.6 or newer is not installed")

from benchmarks.triton_compile import compiling  # noqa: E402
from capsops.backends import BACKENDS  # noqa: E402
from capsops.backends.triton import launch_configs  # noqa: E402
from capsops.measuring.precisions import PRECISIONS  # noqa: E402
from capsops.measuring.trials import Trial, trials  # noqa: E402

if triton.knobs.runtime.interpret:
    pytest.skip("Triton's interpreter is on", allow_module_level=True)

KERNELS = SimpleNamespace(**BACKENDS["triton"].functions)
# Compiling takes half a second for each: a check by hand may take minutes, the automatic one in four
# processes less than one.
MOST_KERNELS = {True: 650, False: 250}


def launch(trial: Trial) -> None:
    """What the op launches forward and backward, where every input requires a gradient."""
    tensors, keywords = trial.arguments("meta")
    names = keywords.pop("names", ())
    named = dict(zip(names, tensors[len(tensors) - len(names) :], strict=True))
    first = tensors[: len(tensors) - len(names)]
    if trial.op == "squash":
        KERNELS.squash_backward(KERNELS.squash(*first, trial.dim % 3), *first, trial.dim % 3)
        return
    if trial.op == "predictions":
        KERNELS.predictions_backward(KERNELS.predictions(*first), *first, True, True)
        return
    bias, logits, mask = named.get("bias"), named.get("logits"), keywords["mask"]
    if logits is not None and logits.dim() == 2:
        logits = logits.unsqueeze(0)
    options = (trial.iterations, trial.leaky)
    if trial.op == "couplings":
        KERNELS.couplings(*first, bias, logits, mask, *options)
        return
    forward, backward = (getattr(KERNELS, name) for name in (trial.op, f"{trial.op}_backward"))
    v, s = forward(*first, bias, logits, mask, *options, trial.squash_output)
    needs = (True,) * (len(first) if trial.op == "capsule_routing" else 0)
    backward(
        v, *first, logits, mask, s, *options, trial.detach, trial.squash_output, *needs, logits is not None
    )


class Recorded:
    """The kernels that would compile, and the entries of launch_configs that made their blocks."""

    def __init__(self) -> None:
        self.kernels: set[tuple[str, str]] = set()
        self.entries: set[tuple[str, str]] = set()

    def hook(self, *, key: str, fn: Any, **rest: object) -> bool:
        self.kernels.add((fn.name, key))
        return True  # nothing compiles


Record = Callable[[str, bool], Recorded]


@pytest.fixture(scope="module")
def known() -> dict[tuple[str, bool], Recorded]:
    """What was recorded, once for all tests."""
    return {}


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch, known: dict[tuple[str, bool], Recorded]) -> Iterator[Record]:
    """A function that launches all that is compared in a precision, by a thorough check or a quick one."""

    def recorded(precision: str, thorough: bool) -> Recorded:
        if (precision, thorough) in known:
            return known[precision, thorough]
        result = known[precision, thorough] = Recorded()

        class Table(dict):
            def __getitem__(self, key: str) -> launch_configs.Entry:
                result.entries.add((self.name, key))
                return super().__getitem__(key)

        for name, entries in tables.items():
            table = Table(entries)
            table.name = name
            monkeypatch.setattr(launch_configs, name, table)
        with compiling("sm_90", PRECISIONS[precision][1]):
            monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", result.hook)
            for trial in trials(replace(BACKENDS["triton"], compiles=True), thorough):
                if trial.precision == precision:
                    launch(trial)
        return result

    tables = {name: getattr(launch_configs, name) for name in ("ROUTED", "GRADIENT")}
    yield recorded
    monkeypatch.undo()


@pytest.mark.parametrize("thorough", [False, True])
def test_few_kernels_compile(thorough: bool, record: Record) -> None:
    kernels = set().union(*(record(precision, thorough).kernels for precision in PRECISIONS))
    assert 50 < len(kernels) < MOST_KERNELS[thorough]


def test_every_entry_of_the_tables_is_compared(record: Record) -> None:
    entries = set().union(*(record(precision, True).entries for precision in PRECISIONS))
    wanted = {(name, key) for name in ("ROUTED", "GRADIENT") for key in getattr(launch_configs, name)}
    assert entries == wanted


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_kernel_is_compared_in_every_precision(precision: str, record: Record) -> None:
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
    assert {name.rpartition(".")[2] for name, _ in record(precision, True).kernels} == names
