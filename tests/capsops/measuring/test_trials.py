"""The comparisons that prove kernels, tried on the CPU's."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from capsops.backends import BACKENDS
from capsops.backends.backend import ALL_OPTIONS
from capsops.measuring import trials as module
from capsops.measuring.precisions import PRECISIONS
from capsops.measuring.trials import Shape, Trial, trials
from capsops.proofs.scope import DTYPES, OPS, PLAIN
from tests.processes import run_python

SMALL = Shape(3, 7, 4, 5, 3)


@pytest.mark.parametrize("thorough", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_every_op_dtype_and_option_is_tried(backend: str, thorough: bool) -> None:
    record = replace(
        BACKENDS[backend if BACKENDS[backend].functions else "cpu"], compiles=backend == "triton"
    )
    chosen = trials(record, thorough)
    calls = {call for trial in chosen for call in trial.calls}
    options = (PLAIN, *ALL_OPTIONS)
    expected = {
        (op, dtype, option)
        for op in OPS
        for dtype in DTYPES
        for option in (options if "routing" in op else options if op == "couplings" else (PLAIN,))
        if not (op == "couplings" and option == "squash_output=False")
    }
    assert calls == expected
    on_cpu = record.devices == ("cpu",)
    assert {trial.precision for trial in chosen} == {
        name for name, (_, tf32) in PRECISIONS.items() if not (on_cpu and tf32)
    }
    assert len(set(chosen)) == len(chosen)
    assert chosen[0].op == "capsule_routing"
    assert not chosen[0].options


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_the_kernels_of_the_cpu_are_right(op: str, precision: str) -> None:
    chosen = [
        trial
        for trial in trials(BACKENDS["cpu"], thorough=False)
        if (trial.op, trial.precision, trial.shape) == (op, precision, module.QUICK_SHAPES[0])
    ]
    assert chosen
    for trial in chosen:
        assert 0 <= trial.compare("cpu", "cpu") < 1e-2
        assert all(x.isfinite().all() for x in trial.call("cpu", "cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: 1.001 * v, "value is off by"),
        (lambda v: v + torch.nan, "value is off by nan"),
        (lambda v: v + 1e-8 * torch.rand(()), "two calls differ by"),
    ],
)
def test_a_wrong_kernel_fails(
    change: Callable[[torch.Tensor], torch.Tensor], message: str, change_backend: Callable[..., None]
) -> None:
    right = BACKENDS["cpu"].functions["capsule_routing"]

    def wrong(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        v, s = right(*args)
        return change(v), s

    change_backend("cpu", capsule_routing=wrong)
    with pytest.raises(AssertionError, match=message):
        Trial("capsule_routing", SMALL, "float32", bias=True).compare("cpu", "cpu")


def test_a_wrong_gradient_fails(change_backend: Callable[..., None]) -> None:
    right = BACKENDS["cpu"].functions["predictions_backward"]
    change_backend("cpu", predictions_backward=lambda *args: tuple(1.001 * x for x in right(*args)))
    with pytest.raises(AssertionError, match="gradient 1 is off by"):
        Trial("predictions", SMALL, "float32").compare("cpu", "cpu")


def test_names() -> None:
    assert str(Trial("squash", SMALL, "float32", dim=1)) == "squash along 1 in float32, B3-I7-J4-D5-K3"
    trial = Trial("couplings", SMALL, "bfloat16", logits=module.OF_PAIRS, mask=True, shared=True)
    assert str(trial) == "couplings T=3 mask shared logits [I, J] in bfloat16, B3-I7-J4-D5-K3"
    assert trial.calls == [
        ("couplings", "bfloat16", option) for option in ("logits", "mask", "shared weights or predictions")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_the_triton_kernels_in_their_interpreter(op: str) -> None:
    if BACKENDS["triton"].unavailable:
        pytest.skip(BACKENDS["triton"].unavailable)
    code = (
        "from capsops.measuring.trials import Shape, Trial;"
        f"print(Trial({op!r}, Shape(2, 3, 2, 4, 4), 'float32').compare('triton', 'cpu'))"
    )
    done = run_python("-c", code, fresh=True, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 1e-5
