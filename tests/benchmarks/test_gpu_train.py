"""The measurement that waits for a GPU runs: its plan anywhere, itself on a CPU at a small size."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import train
from benchmarks.rows import load
from infocapsgan import data, sweep

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    digits = data.load("digits")
    monkeypatch.setattr(train.data, "load", lambda name: digits)
    monkeypatch.setattr(train, "PROFILED_STEPS", 2)
    monkeypatch.setattr(train, "ROUTING_CALLS", 2)
    words = "--device cpu --width 8 --images 32 --batch-sizes 8 --warm-up 1 --epochs 2 --precisions bf16"
    return ["train", "--out", str(tmp_path), "--no-compile", *words.split()]


def test_the_plan_needs_no_gpu() -> None:
    words = [ROOT / "benchmarks/gpu/run_train.sh", "--plan", "--precisions", "bf16"]
    done = subprocess.run(
        list(map(str, words)),
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OUT": "somewhere"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for part in ("build_ext --inplace", "B=128 bf16: compare", "B=256 bf16", "compiled", "go to somewhere"):
        assert part in done.stdout
    assert "fp32" not in done.stdout


def test_without_data_it_says_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(ROOT / "benchmarks/gpu/run_train.sh")],
        env={"PATH": "/usr/bin:/bin", "INFOCAPSGAN_DATA": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert f"{tmp_path}/mnist/train-images-idx3-ubyte.gz is missing" in done.stderr


def test_every_command_of_the_results_is_one_that_the_sweep_takes() -> None:
    done = subprocess.run(
        [str(ROOT / "benchmarks/gpu/run_results.sh"), "--plan"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": "python", "IMPL": "triton", "SEEDS": "7"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    start = "python -m infocapsgan.sweep "
    lines = [line.strip() for line in done.stdout.splitlines() if start in line]
    assert len(lines) == 12
    for line in lines:
        found = sweep.parse(line.removeprefix(start).split())
        assert found.seeds == (7,)
        assert found.settings.impl == "triton"


def test_the_rows_of_a_case(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [*command, "--impl", "cpu", "reference"])
    train.main()
    (path,) = tmp_path.glob("train-*.json")
    header, rows = load(path)
    assert header["failures"] == []
    assert [row.impl for row in rows] == ["cpu", "reference"]
    for row in rows:
        assert row.case == "MNIST epoch, B=8 bf16"
        times = [row.seconds, row.peers["einsum"]]
        times += [row.details[name] for name in ("step", "routing alone", "einsum's routing alone")]
        assert all(seconds > 0 for seconds in times)
        assert row.details["profiled routing"] > 0
        assert [target.what for target in row.targets] == ["seconds", "routing share"]
    profile = (tmp_path / "train-profile.txt").read_text()
    assert "capsops::capsule_routing_backward" in profile


@pytest.mark.slow
def test_what_fails_is_named_and_the_rest_goes_on(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = train.Model.compare

    def fails(model: train.Model, einsum: train.Model) -> None:
        if model.name == "cpu":
            raise RuntimeError("no such kernel")
        compare(model, einsum)

    monkeypatch.setattr(train.Model, "compare", fails)
    monkeypatch.setattr(sys, "argv", [*command, "--impl", "cpu", "reference"])
    with pytest.raises(SystemExit, match="B=8 bf16, cpu: RuntimeError: no such kernel"):
        train.main()
    (path,) = tmp_path.glob("train-*.json")
    assert [row.impl for row in load(path)[1]] == ["reference"]


def test_models_that_differ_are_not_timed(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    einsum = train.EinsumCapsules.forward
    monkeypatch.setattr(train.EinsumCapsules, "forward", lambda layer, u: 1.1 * einsum(layer, u))
    monkeypatch.setattr(sys, "argv", [*command, "--impl", "reference"])
    with pytest.raises(SystemExit, match="differs from einsum"):
        train.main()
