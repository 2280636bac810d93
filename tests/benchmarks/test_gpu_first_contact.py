"""The first run on a GPU, as far as a CPU can try it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import edge, equivalence, first_contact, op_times
from benchmarks.gpu.record import record, recorded
from benchmarks.passes import FORWARD, FORWARD_BACKWARD

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUT", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_the_script_runs_its_parts_without_a_gpu(out: Path) -> None:
    environment = os.environ | {"DEVICE": "cpu", "IMPLS": "cpu", "PYTHON": sys.executable}
    environment["PARTS"] = "env correct times"
    script = ROOT / "benchmarks/gpu/first_contact.sh"
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=280)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    parts = {row["part"] for row in rows}
    assert parts == {"env", "ceilings", "correct", "times"}, done.stdout
    assert not any(row.get("failures") for row in rows)
    assert "correct, cpu: 135 compared, 0 failed" in (out / "table.txt").read_text()
    assert len(list(out.iterdir())) <= 8


def test_a_part_that_fails_is_recorded_and_the_next_runs(out: Path) -> None:
    """By a stand-in for Python that fails in one part."""
    python = out / "python"
    python.write_text('#!/bin/sh\n[ "$3" != correct ] || exit 7\necho "ran $3"\n')
    python.chmod(0o755)
    environment = os.environ | {"DEVICE": "cpu", "IMPLS": "cpu", "PYTHON": str(python), "LIMIT": "120"}
    script = ROOT / "benchmarks/gpu/first_contact.sh"
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=60)
    assert [row["status"] for row in recorded("failed")] == [7]
    assert all(f"ran {part}" in done.stdout for part in ("env", "times", "train"))
    assert "ran table" in (out / "table.txt").read_text()
    assert done.returncode == 1


def test_on_a_gpu_every_part_runs_and_what_fails_runs_again(out: Path, tmp_path: Path) -> None:
    """By stand-ins for Python and the tools of CUDA; the stand-in for Python fails once, in `times`."""
    tools = tmp_path / "tools"
    tools.mkdir()
    compiler = 'for last; do :; done; printf "#!/bin/sh\\necho {}\\n" >"$last"; chmod +x "$last"'
    once = tmp_path / "once"
    for name, text in {
        "python": f'echo "ran $*"; [ "$3" != times ] || [ -e {once} ] || {{ touch {once}; exit 1; }}',
        "nvidia-smi": "echo a GPU",
        "compute-sanitizer": 'echo "===== SUMMARY of $*"',
        "ncu": 'echo "Registers Per Thread, $*"',
        "nvcc": compiler,
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    results = out / "results"
    environment = os.environ | {"PYTHON": str(tools / "python"), "OUT": str(results)}
    environment["PATH"] = f"{tools}:{environment['PATH']}"
    script = ROOT / "benchmarks/gpu/first_contact.sh"
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=100)
    for part in ("env", "edge", "correct", "warm-up", "systems", "sanitizer", "times", "train", "table"):
        assert f"ran -m benchmarks.gpu.first_contact {part} --device cuda" in done.stdout, part
    assert done.stdout.count("ran -m benchmarks.gpu.first_contact times") == 2
    assert "ran -m pytest tests/capsops/test_on_gpu.py" in done.stdout
    sanitizers = (results / "sanitizer.txt").read_text()
    logs = ["memcheck-0", "synccheck-0", "initcheck-0", *(f"racecheck-{n}" for n in range(8))]
    assert all(f"==== cuda-{log}.log" in sanitizers for log in logs)
    assert len((results / "sketches.jsonl").read_text().splitlines()) == 2
    assert "counters: 1 kernels" in done.stdout
    assert len(list(results.iterdir())) <= 8


def test_results_that_are_there_are_not_mixed_with_others(out: Path) -> None:
    record("env", device="another")
    script = ROOT / "benchmarks/gpu/first_contact.sh"
    for settings, said in (({}, "name another OUT"), ({"PARTS": "time"}, "PARTS: got time, takes env")):
        done = subprocess.run(
            ["bash", script], env=os.environ | settings, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2
        assert said in done.stderr


def test_no_part_begins_when_the_time_is_over(out: Path) -> None:
    environment = os.environ | {"DEVICE": "cpu", "PYTHON": "false", "LIMIT": "10"}
    script = ROOT / "benchmarks/gpu/first_contact.sh"
    subprocess.run(["bash", script], env=environment, capture_output=True, timeout=60)
    failed = {(row["name"].split()[0], row["status"]) for row in recorded("failed")}
    assert failed >= {(part, 124) for part in ("env", "correct", "times", "train")}


def test_cases_are_timed_once_and_failures_stay_in_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(op_times, "SAMPLE_SECONDS", 1e-5)
    small = [
        op_times.Case("capsule_routing", 2, 5, 3, 4, 8, "float32", False, FORWARD_BACKWARD),
        op_times.Case("squash", 2, 5, 3, 4, 8, "bfloat16", False, FORWARD),
    ]
    for _ in range(2):
        op_times.time_all(["cpu", "cuda"], CPU, 60, small)
    rows = recorded("times")
    assert [row["case"] for row in rows] == [case.key for case in small]
    assert set(rows[0]["calls"]) == {"cpu", "reference", "matmul", "einsum", "einsum + sums"}
    assert rows[0]["differences"]["cpu"] < 1e-5
    assert "not available" in rows[0]["failures"]["cuda"]
    op_times.time_all(["cpu"], CPU, 0, [op_times.Case("squash", 3, 5, 3, 4, 8, "float32", False, FORWARD)])
    assert recorded("not timed")[0]["cases"] == ["squash B=3 5×3 D=4 K=8 float32, forward"]
    monkeypatch.setattr(sys, "argv", ["first_contact", "table", "--impls", "cpu", "cuda"])
    first_contact.main()
    printed = capsys.readouterr().out
    assert "not timed: squash B=3 5×3 D=4 K=8 float32, forward" in printed
    assert "cuda: RuntimeError: impl='cuda' is not available" in printed


def test_every_case_has_a_key_of_its_own() -> None:
    keys = [case.key for case in op_times.cases()]
    assert len(set(keys)) == len(keys)
    assert {case.op for case in op_times.cases()} == set(op_times.OPS)


def test_after_a_fault_of_the_device_tasks_are_lost_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equivalence, "_device_works", lambda device: False)
    task = equivalence.Task("cpu", CPU, (1, 7, 3, 4, 8), torch.float32, False, equivalence.FEW_OPTIONS, 1e12)
    outcome = equivalence.compare(task)
    assert outcome.lost
    assert not outcome.failures
    assert outcome.compared == 0


@pytest.mark.parametrize("check", [edge.odd_address, edge.tf32_setting, edge.second_gradient])
def test_edges_that_need_no_gpu(check: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "DEVICE", "cpu")
    assert check("cpu")["error"] < 1e-2


def test_edges_that_raise_are_recorded_and_fail_their_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(impl: str) -> dict[str, float]:
        raise ValueError(f"{impl} cannot")

    monkeypatch.setattr(edge, "REST", (fails,))
    monkeypatch.setattr("benchmarks.gpu.record._failures", [])
    monkeypatch.setattr(sys, "argv", ["first_contact", "edge", "--impl", "cpu"])
    with pytest.raises(SystemExit, match="edge: 1 failed: ValueError: cpu cannot"):
        first_contact.main()
    assert recorded("edge")[0]["failed"] == "ValueError: cpu cannot"


def test_lines_are_whole() -> None:
    record("a", text="û")
    record("b", number=float("nan"))
    assert [row["part"] for row in recorded("a", "b")] == ["a", "b"]
