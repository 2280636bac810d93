"""The command runs, checks what it compares, and splits a step into its parts."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import systems
from benchmarks.report import main as report
from benchmarks.rows import load
from benchmarks.system_step import EinsumCapsules, SystemStep, check_equal, parts, profiled
from capsops.nn import RoutingCapsules
from infocapsgan.systems import CapsNet


def test_the_rows_of_two_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = "capsnet dcgan --width 8 --batch-size 8 --threads 1 --save-results"
    monkeypatch.setattr(sys, "argv", ["systems", *words.split()])
    monkeypatch.setattr(systems, "RESULTS", tmp_path)
    systems.main()
    (path,) = tmp_path.iterdir()
    header, (capsnet, compared, dcgan) = load(path)
    assert header["command"] == f"python -m benchmarks.systems {words}"
    assert set(capsnet.details) == {"routing", "squash", "convolutions", "loader", "optimiser", "other"}
    assert all(seconds > 0 for seconds in capsnet.details.values())
    assert dcgan.details["routing"] == 0
    assert compared.seconds > 0
    assert compared.details["routing by itself"] > 0
    assert compared.peers["einsum"] > 0
    assert compared.details["einsum's routing by itself"] > 0
    monkeypatch.setattr(sys, "argv", ["report", str(path)])
    capsys.readouterr()
    report()
    shown = capsys.readouterr().out
    for part in (
        "- capsnet, published, B=8, width 8, fp32: step",
        "s: routing ",
        ", einsum ",
        "einsum's routing by itself",
    ):
        assert part in shown


@pytest.mark.slow
def test_bfloat16(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    words = "capsnet --width 8 --batch-size 8 --precision bf16"
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["systems", *words.split(), "--threads", str(threads)])
    systems.main()
    assert "- capsnet, published, B=8, width 8, bf16: step" in capsys.readouterr().out


def test_an_unknown_system_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["systems", "resnet"])
    with pytest.raises(SystemExit):
        systems.main()
    assert "SYSTEM: got resnet" in capsys.readouterr().err


def test_the_einsum_layer_is_the_routing_layer() -> None:
    layer = RoutingCapsules(6, 3, 4, 5)
    u = torch.randn(2, 6, 4)
    torch.testing.assert_close(EinsumCapsules(layer)(u), layer(u))
    with pytest.raises(ValueError, match="leaky or detach"):
        EinsumCapsules(RoutingCapsules(6, 3, 4, 5, leaky=True))


def test_models_that_differ_are_not_compared() -> None:
    ours, other = CapsNet(width=8), CapsNet(width=8)
    with pytest.raises(AssertionError, match="the two models differ"):
        check_equal(ours, other, ours.load_data())


def test_the_parts_of_a_step_add_up() -> None:
    system = CapsNet(width=8, batch_size=8)
    step = SystemStep(system, system.load_data())
    seconds = parts(*profiled(step, 3, step.device), 3, step.device)
    assert step.state.step == 3
    assert sum(seconds.values()) < 1
    assert seconds["loader"] < sum(seconds.values()) / 2
