"""The first run on a GPU, as far as a CPU can try it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import first_contact, goals, op_times
from benchmarks.gpu.record import failure_recorded, record, recorded
from capsops.measuring.cases import Case
from capsops.measuring.headline import REPLAY, TF32
from capsops.measuring.passes import FORWARD, FORWARD_BACKWARD

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUT", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_the_script_runs_its_parts_without_a_gpu(out: Path) -> None:
    environment = os.environ | {"DEVICE": "cpu", "IMPLS": "cpu", "PYTHON": sys.executable}
    environment["PARTS"] = "env check bench times classes"
    environment["XDG_CACHE_HOME"] = str(out / "cache")
    script = ROOT / "benchmarks/gpu/first_contact.sh"
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=280)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    parts = {row["part"] for row in rows}
    assert parts == {"env", "info", "ceilings", "check", "bench", "classes", "times begun", "times"}, (
        done.stdout
    )
    assert not any(row.get("failed") or row.get("failures") for row in rows)
    (check,) = recorded("check")
    assert check["complete"]
    assert {call["op"] for call in check["calls"]} == set(op_times.OPS)
    table = (out / "table.txt").read_text()
    assert "capsule_routing  float32   right" in table
    assert "| B=128 forward" in table
    assert "not measured: float32, TF32 allowed, forward, × plain PyTorch eager, at least 6" in table
    shutil.rmtree(out / "cache")
    assert len(list(out.iterdir())) <= 8


def test_a_part_that_fails_is_recorded_and_the_next_runs(out: Path) -> None:
    """By a stand-in for Python that fails in one part."""
    python = out / "python"
    python.write_text('#!/bin/sh\n[ "$3" != check ] || exit 7\necho "ran $3"\n')
    python.chmod(0o755)
    environment = os.environ | {"DEVICE": "cpu", "IMPLS": "cpu", "PYTHON": str(python), "LIMIT": "120"}
    script = ROOT / "benchmarks/gpu/first_contact.sh"
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=60)
    assert [row["status"] for row in recorded("failed")] == [7]
    assert all(f"ran {part}" in done.stdout for part in ("env", "bench", "times", "train"))
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
    for part in ("env", "check", "warm-up", "systems", "bench", "times", "train", "table"):
        assert f"ran -m benchmarks.gpu.first_contact {part} --device cuda" in done.stdout, part
    for impl in ("cuda", "triton"):
        assert re.search(rf"first_contact check --device cuda --seconds \d+ --impls {impl}", done.stdout)
        assert f"test_edges_on_gpu.py::test_first_call_in_a_capture -k {impl}" in done.stdout
    assert done.stdout.count("ran -m benchmarks.gpu.first_contact times") == 2
    assert "ran -m pytest tests/capsops/test_on_gpu.py" in done.stdout
    sanitizers = (results / "sanitizer.txt").read_text()
    for tool, runs in (("memcheck", 1), ("synccheck", 1), ("initcheck", 1), ("racecheck", 4)):
        assert sanitizers.count(f"==== sanitizer-{tool}") == runs
    assert sanitizers.count("first_contact exercise --impls cuda --share") == 7
    assert len((results / "sketches.jsonl").read_text().splitlines()) == 2
    assert "counters: 1 kernels" in done.stdout
    assert len(list(results.iterdir())) <= 8


def test_earlier_results_are_not_mixed_with_others(out: Path) -> None:
    record("env", device="another")
    script = ROOT / "benchmarks/gpu/first_contact.sh"
    for settings, message in (({}, "name another OUT"), ({"PARTS": "time"}, "PARTS: got time, takes env")):
        done = subprocess.run(
            ["bash", script], env=os.environ | settings, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2
        assert message in done.stderr


def test_no_part_begins_when_the_time_is_over(out: Path) -> None:
    environment = os.environ | {"DEVICE": "cpu", "PYTHON": "false", "LIMIT": "10"}
    script = ROOT / "benchmarks/gpu/first_contact.sh"
    subprocess.run(["bash", script], env=environment, capture_output=True, timeout=60)
    failed = {(row["name"].split()[0], row["status"]) for row in recorded("failed")}
    assert failed >= {(part, 124) for part in ("env", "check", "bench", "times", "train")}


def test_a_second_call_goes_on_with_the_first(out: Path) -> None:
    """It takes the results of the first, and is done in four minutes."""
    before = out / "before.jsonl"
    before.write_text('{"part": "env", "device": "another"}\n')
    python = out / "python"
    python.write_text('#!/bin/sh\necho "ran $3 $*"\n')
    python.chmod(0o755)
    environment = os.environ | {"DEVICE": "cpu", "PYTHON": str(python), "BEFORE": str(before)}
    script = ROOT / "benchmarks/gpu/second_contact.sh"
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert recorded("env")[0]["device"] == "another"
    for part in ("automatic", "classes", "times", "train"):
        assert f"ran {part}" in done.stdout
    assert "ran bench" not in done.stdout
    environment["BEFORE"] = str(out / "none")
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2


def test_goals() -> None:
    """Of a row that meets some of them."""
    row = {"batch": 128, "precision": TF32, "passes": FORWARD, "timed_by": REPLAY, "ours": 40e-6,
           "eager": {"einsum": 400e-6, "matmul": 300e-6}, "compiled": {"matmul": 100e-6},
           "memory": {}}  # fmt: skip
    backward = row | {"passes": FORWARD_BACKWARD, "compiled": {}, "memory": {"ours": 3, "einsum": 90}}
    lines = list(goals.verdicts([row, backward], [{"precision": "bf16", "seconds": 5.0}]))
    assert lines[:6] == [
        "met: float32, TF32 allowed, forward, × plain PyTorch eager: 7.5, at least 6",
        "MISSED: float32, TF32 allowed, forward, × plain PyTorch compiled: 2.5, at least 3",
        "met: float32, TF32 allowed, forward, µs: 40, at most 42",
        "met: float32, TF32 allowed, forward + backward, × plain PyTorch eager: 7.5, at least 6",
        "not measured: float32, TF32 allowed, forward + backward, × plain PyTorch compiled, at least 3",
        "met: float32, TF32 allowed, forward + backward, µs: 40, at most 110",
    ]
    assert (
        "met: float32, TF32 allowed, forward + backward, memory, share of eager plain PyTorch's" in lines[6]
    )
    assert lines[-1] == "MISSED: an epoch of CapsNet in bf16, seconds: 5, at most 4"


def test_cases_are_timed_once_and_failures_stay_in_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(op_times, "SAMPLE_SECONDS", 1e-5)
    small = [
        (Case(2, 5, 3, 4, 8), FORWARD_BACKWARD),
        (Case(2, 5, 3, 4, 8, precision="bfloat16", op="squash"), FORWARD),
    ]
    for _ in range(2):
        op_times.time_all(["cpu", "cuda"], CPU, 60, small)
    rows = recorded("times")
    assert [row["case"] for row in rows] == [op_times.title(*one) for one in small]
    assert set(rows[0]["calls"]) == {"cpu", "reference", "matmul", "einsum", "einsum + sums"}
    assert rows[0]["differences"]["cpu"] < 1e-5
    assert "not available" in rows[0]["failures"]["cuda"]
    op_times.time_all(["cpu"], CPU, 0, [(Case(3, 5, 3, 4, 8, op="squash"), FORWARD)])
    assert recorded("not timed")[0]["cases"] == ["squash B=3 5×3 D=4 K=8 T=3, forward"]
    monkeypatch.setattr(sys, "argv", ["first_contact", "table", "--impls", "cpu", "cuda"])
    first_contact.main()
    printed = capsys.readouterr().out
    assert "'not timed', 'cases': ['squash B=3 5×3 D=4 K=8 T=3, forward']" in printed
    assert "cuda: RuntimeError: impl='cuda' is not available" in printed


def test_every_case_has_a_name_of_its_own() -> None:
    names = [op_times.title(*one) for one in op_times.cases()]
    assert len(set(names)) == len(names)
    assert {case.op for case, _ in op_times.cases()} == set(op_times.OPS)


def test_a_part_goes_on_after_a_failure_and_fails_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def part(args: object) -> None:
        for number in (1, 2):
            with failure_recorded("env", number=number):
                raise ValueError(f"number {number}")

    monkeypatch.setattr("benchmarks.gpu.record.failures", failures := [])
    monkeypatch.setattr(first_contact, "failures", failures)
    monkeypatch.setitem(first_contact.PARTS, "env", part)
    monkeypatch.setattr(sys, "argv", ["first_contact", "env"])
    with pytest.raises(SystemExit, match="env: 2 failed: ValueError: number 1"):
        first_contact.main()
    assert [row["failed"] for row in recorded("env")] == ["ValueError: number 1", "ValueError: number 2"]


def test_lines_are_whole() -> None:
    record("a", text="û")
    record("b", number=float("nan"))
    assert [row["part"] for row in recorded("a", "b")] == ["a", "b"]
