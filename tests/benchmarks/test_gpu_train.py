"""CapsNet's epoch on a GPU, as far as a CPU can try it, and the commands of the full-size results."""

import subprocess
from pathlib import Path

import pytest

from benchmarks.gpu import train
from infocapsgan import data, sweep

ROOT = Path(__file__).parents[2]


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
        arguments = sweep.parse(line.removeprefix(start).split())
        assert arguments.seeds == (7,)
        assert arguments.settings.impl == "triton"


@pytest.mark.parametrize("impl", ["cpu", train.EINSUM])
def test_an_epoch(impl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    results = train.epoch(data.load("digits").head(32), impl, "bf16", captured=False, batch=8, width=8)
    assert results["seconds"] > 0
    assert 0 <= results["accuracy of the last batches"] <= 1
    profile = (tmp_path / "train-profile.txt").read_text()
    assert (results["profiled parts of a step"]["routing"] > 0) == (impl == "cpu")
    assert ("capsops::capsule_routing_backward" in profile) == (impl == "cpu")


def test_models_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    einsum = train.EinsumCapsules.forward
    monkeypatch.setattr(train.EinsumCapsules, "forward", lambda layer, u: 1.1 * einsum(layer, u))
    with pytest.raises(AssertionError, match="the two models differ"):
        train.epoch(data.load("digits").head(32), "cpu", "fp32", captured=False, batch=8, width=8)
