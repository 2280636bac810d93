"""The measurements of a GPU's kernels, as far as a CPU can run them."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import capsops
from benchmarks import timing
from benchmarks.cases import RoutingCase
from benchmarks.gpu import equivalence, exercise, kernels, sanitizer
from benchmarks.gpu.breakdown import kernel_name, part_of
from benchmarks.gpu.clock import device_clock, in_turns, input_sets
from benchmarks.gpu.floor import GRADIENTS, PASSES, REDUCTIONS, Ceilings, floor_seconds, least_seconds
from benchmarks.passes import BOTH, FORWARD, FORWARD_BACKWARD, run
from tests.tiers import fast_only

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
CEILINGS = Ceilings(bandwidth=4e12, bfloat16=8e14, tf32=4e14, float32=5e13, exponentials=4e12)
SMALL = RoutingCase(2, 5, 3, 4, 8)


@pytest.mark.parametrize("impl", fast_only(["cuda"], ["triton", "cuda"]))
def test_the_scripts_plan_without_a_gpu(impl: str) -> None:
    script = ROOT / "benchmarks" / "gpu" / f"run_{impl}.sh"
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", script, "--plan"], env=environment, capture_output=True, text=True, check=True
    )
    for task in kernels.tasks(impl):
        assert str(task) in done.stdout
    assert "targets" in done.stdout


def test_each_case_is_timed_once_and_those_with_targets_first() -> None:
    for impl in ("triton", "cuda"):
        tasks = kernels.tasks(impl)
        keys = [(task.case, task.passes, task.tf32) for task in tasks]
        assert len(set(keys)) == len(keys)
        with_goals = [bool(any(vars(task.goal).values())) for task in tasks]
        assert with_goals == sorted(with_goals, reverse=True)
        assert with_goals[0]


def test_a_wrong_kernel_fails_the_comparison() -> None:
    shape = equivalence.SMALL[0]
    found = next(
        x for x in equivalence.comparisons("cpu", CPU, torch.float32, [shape]) if "capsule" in x.name
    )
    assert found(tf32=False) < 1e-5
    wrong = replace(found, ours=lambda *inputs: 1.001 * found.ours(*inputs))
    with pytest.raises(AssertionError, match="value is off"):
        wrong(tf32=False)
    restless = replace(found, ours=lambda *inputs: found.ours(*inputs) + 1e-8 * torch.rand(()))
    with pytest.raises(AssertionError, match="two calls differ"):
        restless(tf32=False)


def test_failures_are_collected_and_late_ones_named() -> None:
    outcome = equivalence.compare_all("triton", torch.device("cpu"), equivalence.SMALL[:1], 1e9)
    if not any(s.impl == "triton" and s.device == "cpu" and s.available for s in capsops.dispatch.describe()):
        assert len(outcome.failures) == outcome.compared > 0
    late = equivalence.compare_all("cpu", CPU, equivalence.SMALL[:1], 0)
    assert "not compared" in late.late[0]
    assert late.compared == 0
    assert not late.failures


@pytest.mark.slow
def test_processes_share_the_comparisons() -> None:
    found = equivalence.compare_all("cpu", CPU, equivalence.SMALL[:1], 1e9, workers=1)
    assert not found.failures
    assert found.compared > 60
    assert set(found.worst) == {"float32", "bfloat16", "float16"}


@pytest.fixture(autouse=True)
def short_races(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "RACE_SECONDS", 0.01)
    monkeypatch.setattr(kernels, "Race", partial(timing.Race, sample=1e-4))


@pytest.mark.parametrize("passes", BOTH)
def test_a_case_is_measured(passes: str) -> None:
    task = kernels.Task(SMALL, passes, False, kernels.Goal(eager=1, share=0.5))
    row, failures = kernels.measure(task, "reference", [], CEILINGS, CPU)
    assert not failures
    assert row.seconds > 0
    assert set(row.peers) == {"matmul", "einsum", "einsum + sums"}
    assert {target.what for target in row.targets} == {"eager", "share"}
    assert row.error < 1e-5


def test_peers_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.peers.ROUTING["einsum"]
    monkeypatch.setitem(kernels.peers.ROUTING, "einsum", lambda *args, **options: 2 * right(*args, **options))
    row, failures = kernels.measure(kernels.Task(SMALL, FORWARD, False), "reference", [], CEILINGS, CPU)
    assert set(row.peers) == {"matmul", "einsum + sums"}
    assert "differs from ours" in failures[0]


def test_floor_counts_every_unit() -> None:
    case = RoutingCase(128)
    seconds, unit = floor_seconds(case, FORWARD, CEILINGS, tf32=True)
    pairs = 128 * 1152 * 10
    assert unit == "sums"
    assert seconds == pytest.approx(2 * 2 * 2 * pairs * 16 / 5e13)
    seconds, unit = floor_seconds(case, FORWARD, CEILINGS, tf32=False)
    assert seconds == pytest.approx((4 * 2 + 3 * 2 * 8) * pairs * 16 / 5e13)
    both, _ = floor_seconds(case, FORWARD_BACKWARD, CEILINGS, tf32=True)
    assert both == pytest.approx((4 + 6 + 8 + 1) * 2 * pairs * 16 / 5e13)
    slow = replace(CEILINGS, bandwidth=1e9)
    assert floor_seconds(case, FORWARD, slow, tf32=True)[1] == "bytes"


def test_floors_of_the_parts_are_at_most_that_of_the_whole_together() -> None:
    case = RoutingCase(128)
    whole, _ = floor_seconds(case, FORWARD_BACKWARD, CEILINGS, tf32=True)
    parts = [least_seconds(part, case, CEILINGS, tf32=True) for part in (PASSES, REDUCTIONS, GRADIENTS)]
    assert all(unit == "sums" for _, unit in parts)
    assert sum(seconds for seconds, _ in parts) == pytest.approx(whole)


@pytest.mark.parametrize(
    ("symbol", "name", "part"),
    [
        (
            "void capsops::passes_kernel<capsops::Tf32, (int)2, (int)2, (bool)1>(capsops::Fused)",
            "passes_kernel<Tf32, 2, 2, 1>",
            REDUCTIONS,
        ),
        (
            "void capsops::passes_kernel<capsops::SixteenBit<__nv_bfloat16>, 2, 2, false>(capsops::Fused)",
            "passes_kernel<SixteenBit<__nv_bfloat16>, 2, 2, false>",
            PASSES,
        ),
        (
            "void capsops::gradients_kernel<capsops::MultiplyAdds, 2, 1, 2>(capsops::Fused)",
            "gradients_kernel<MultiplyAdds, 2, 1, 2>",
            GRADIENTS,
        ),
        (
            "void capsops::(anonymous namespace)::grad_bias_kernel<float>(capsops::Routing)",
            "grad_bias_kernel<float>",
            None,
        ),
    ],
)
def test_kernels_have_names_and_floors(symbol: str, name: str, part: object) -> None:
    assert kernel_name(symbol) == name
    assert part_of(name) == part


def test_a_profiler_that_fails_is_told() -> None:
    def fails() -> dict[str, float]:
        raise RuntimeError("no counters")

    failures: list[str] = []
    assert kernels.parts("a case", lambda: {"kernel": 1.0}, failures) == {"kernel": 1.0}
    assert kernels.parts("a case", fails, failures) == {}
    assert failures == ["a case, by kernel: RuntimeError: no counters"]


SUMMARY = "========= ERROR SUMMARY: 1 error"


@pytest.mark.parametrize(
    ("output", "code", "found"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, ""),
        (f"=========     at void at::native::reduce_kernel<512>(T)+0x10\n{SUMMARY}", 0, ""),
        (f"=========     at void capsops::passes_kernel<T>(F)+0x10\n{SUMMARY}", 0, "1 reports"),
        (f"8 calls, 1 wrong\n{SUMMARY}", 1, "exit 1"),
        ("========= Error: Device not supported", 255, "no summary"),
        ("", None, "took more than"),
    ],
)
def test_what_a_sanitizer_finds_in_our_kernels_fails(output: str, code: int | None, found: str) -> None:
    said = " ".join(sanitizer.judge("cuda", "memcheck", code, output))
    assert found in said
    assert bool(said) == bool(found)


def test_a_sanitizer_runs_every_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in that says what it was to run."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\necho "$@, caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING"\necho "===== SUMMARY"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizer, "find", lambda: str(tool))
    runs = sanitizer.start("cuda", tmp_path / "out")
    assert sanitizer.collect("cuda", runs) == []
    for name in ("memcheck", "racecheck", "synccheck", "initcheck"):
        said = (tmp_path / "out" / f"cuda-{name}.log").read_text()
        assert said.startswith(f"--tool {name} ")
        assert "-m benchmarks.gpu.exercise --impl cuda, caching off: 1" in said
    assert sanitizer.collect("cuda", []) == ["compute-sanitizer: not found"]


def test_the_exercise_is_of_every_op() -> None:
    seen = set()
    for name, function, inputs, passes in exercise.calls("cpu", CPU, torch.float32, equivalence.SMALL[0]):
        with torch.no_grad():
            grad = torch.ones_like(function(*inputs))
        assert all(x.isfinite().all() for x in run(function, passes, inputs, grad))
        seen.add(name)
    assert seen == {"squash", "predictions", "capsule_routing", "dynamic_routing", "couplings"}


def test_inputs_take_turns() -> None:
    sets = input_sets(SMALL, CPU)
    assert len(sets) >= 2
    assert all(torch.equal(x[0][0], sets[0][0][0]) for x in sets)
    seen: list[int] = []
    call = in_turns(lambda inputs, grad: seen.append(inputs[0].data_ptr()), sets)
    assert device_clock(CPU)(call, 2) > 0
    assert seen == [x[0][0].data_ptr() for x in sets] * 2
    assert len(set(seen)) == len(sets)


def test_targets_need_rivals() -> None:
    task = kernels.Task(SMALL, FORWARD, True, kernels.Goal(eager=15, compiled=5))
    row = partial(kernels.Row, "s", "op", "case", FORWARD)(seconds=1.0)
    found = kernels.targets(task, row, {"einsum": 20.0, "einsum, compiled": 4.0})
    assert [(x.what, x.got, x.met) for x in found] == [("eager", 20.0, True), ("compiled", 4.0, False)]
    assert kernels.targets(task, row, {}) == []
