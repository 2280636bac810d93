"""`python -m capsops check`, with kernels of the CPU that take a second to check."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch

from capsops import check, dispatch
from capsops.measuring import class_times
from capsops.measuring.cases import Case
from capsops.proofs import child, order, records
from capsops.proofs.scope import DTYPES, OPS, every_op


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    return check.run(parser.parse_args([*words, "--device", "cpu"]))


def test_a_check_by_hand(user: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    """Its record serves the next process."""
    assert run("--backend", "cpu", "--quick") == 0
    printed = capsys.readouterr().out
    assert "  op               dtype    plain  " in printed
    for op in OPS:
        assert any(line.split()[:3] == [op, "float32", "right"] for line in printed.splitlines())
    path = records.path(records.key(dispatch.BACKENDS["cpu"], user.device))
    assert f"record: {path}" in printed
    assert user.serves() == "cpu"
    assert user.said() == "", "nothing is checked again"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["wrong", "segmentation fault", "no memory"])
def test_a_check_by_hand_that_fails(
    fault: str, user: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    user.fault(fault)
    assert run("--backend", "cpu", "--quick", "--json") == 1
    (result,) = json.loads(capsys.readouterr().out)["checks"]
    assert bool(result["wrong"]) == (fault != "no memory")
    assert bool(result["unfinished"]) == (fault == "no memory")
    if fault == "wrong":
        right = {call["op"] for call in result["calls"] if not call["wrong"]}
        assert right == set(OPS) - {"capsule_routing"}
        assert "WRONG: capsule_routing T=3 bias in float32" in check.summary(result)


def test_several_processes_check_side_by_side(user: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "jobs", lambda backend, device: 2)
    assert user.serves() == "cpu"
    assert user.recorded().complete
    assert {op for op, _, _ in user.recorded().results} == set(OPS)


def test_a_check_that_came_less_far_replaces_nothing(
    user: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = records.key(dispatch.BACKENDS["cpu"], user.device)
    right = dict.fromkeys(every_op(), "")
    records.write(records.Record(key, right, complete=True))
    some = records.Record(key, {("squash", "float32", ""): ""})
    monkeypatch.setattr(child, "run", lambda *_, **__: child.Outcome(some, "it was stopped"))
    assert run("--backend", "cpu", "--quick") == 1
    assert "an earlier one, which came further, stays" in capsys.readouterr().out
    assert user.recorded().results == right


def test_what_cannot_be_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--backend", "cuda") == 2
    assert "--backend cuda: takes tensors on cuda, and the device is cpu" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--backend", "fast")


def test_times_are_a_record_that_orders_backends(
    monkeypatch: pytest.MonkeyPatch, user: SimpleNamespace
) -> None:
    monkeypatch.setattr(class_times, "SAMPLE", 1e-5)
    monkeypatch.setattr(class_times, "LENGTH", 1e-5)
    small = dict.fromkeys(order.CLASSES, Case(2, 5, 3))
    monkeypatch.setattr(class_times, "cases", lambda device: small)
    said: list[str] = []
    rows = class_times.class_times(user.device, ["cpu"], said.append)
    assert [(row["op"], row["dtype"], row["class"]) for row in rows] == [
        (op, dtype, kind) for op in OPS for dtype in DTYPES for kind in order.CLASSES
    ]
    for row in rows:
        able = {"cpu", "reference"} if row["dtype"] == "float32" else {"reference"}
        assert set(row["order"]) == able == set(row["seconds"])
        assert len(row["seconds"]["reference"]) == (1 if row["op"] == "couplings" else 2)
    device = {**user.device._asdict()}
    result = {"capsops": "0", "torch": "2", "triton": "3", "date": "now", "device": device, "checks": []}
    printed = check.text({**result, "times": rows})
    assert printed.count("\n  capsule_routing  float32") == 4
    assert "the order by these is for CAPSOPS_RECORD" in printed


def test_shares_have_no_call_in_common() -> None:
    from capsops.backends import BACKENDS
    from capsops.measuring.trials import trials

    everything = trials(BACKENDS["cpu"], thorough=False)
    shares = [check._share(everything, n, 4) for n in range(4)]
    assert sorted(str(trial) for share in shares for trial in share) == sorted(map(str, everything))
    calls = [{call for trial in share for call in trial.calls} for share in shares]
    assert sum(map(len, calls)) == len(set().union(*calls))


@pytest.mark.slow
def test_everything_on_this_machine(capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch) -> None:
    """The kernels of the CPU as they are, with every option."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.set_num_threads(2)
    assert run("--backend", "cpu", "--quick") == 0
    assert "WRONG" not in capsys.readouterr().out
