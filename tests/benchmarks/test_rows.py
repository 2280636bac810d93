"""Rows survive the file, files are whole, and tables show which targets were met."""

import json
from pathlib import Path

import pytest

from benchmarks.machine import slug
from benchmarks.report import table
from benchmarks.rows import Row, Target, load, save


def row() -> Row:
    return Row(
        *("routing", "capsule_routing", "B=128 1152×10", "forward", "float32", "cpu"),
        seconds=0.008,
        peers={"einsum": 0.2, "einsum, compiled": 0.1},
        memory=1 << 20,
        peers_memory={"einsum": 100 << 20},
        targets=[Target("ratio", 10, 12.5), Target("share", 0.5, 0.45), Target("memory", 10, 9, most=True)],
    )


def test_the_fastest_peer_counts() -> None:
    assert row().peer == "einsum, compiled"
    assert row().ratio == pytest.approx(12.5)


def test_targets() -> None:
    assert [target.met for target in row().targets] == [True, False, True]


def test_rows_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    save(path, {"commit": "abc"}, [row()])
    assert load(path) == ({"commit": "abc"}, [row()])
    assert json.loads(path.read_text())["rows"][0]["targets"][1]["met"] is False


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpu.json"
    save(path, {"commit": "old"}, [row()])

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save(path, {"commit": "new"}, [row()])
    assert load(path)[0] == {"commit": "old"}
    assert list(tmp_path.iterdir()) == [path]


def test_the_table() -> None:
    *_, line = table([row()])
    for part in (
        "8 ms",
        "100 ms",
        "einsum, compiled",
        "12.5 ×",
        "≥ 10 ×: met",
        "≥ 50% of ceiling: MISSED, 45%",
    ):
        assert part in line


def test_slugs() -> None:
    assert slug("AMD EPYC 9654 96-Core") == "amd-epyc-9654-96-core"
    assert slug("Intel(R) Core(TM) i7-1165G7 @ 2.80GHz") == "intel-core-i7-1165g7-2-80ghz"
