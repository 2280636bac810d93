"""`python -m capsops bench` on a tiny layer: table, JSON, and what it does where something is missing."""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import capsops
from capsops import __main__ as command
from capsops import bench
from capsops.measuring import headline
from capsops.measuring.bench_report import WIDTH, report
from capsops.measuring.cases import Case, exact, plain
from capsops.measuring.ceiling import Ceiling
from capsops.measuring.headline import CALLS, REPLAY, TF32, Budget, Row
from capsops.measuring.operations import operations
from capsops.measuring.passes import BOTH, FORWARD, FORWARD_BACKWARD

TINY = Case(1, in_capsules=7, out_capsules=3)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_races(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(bench.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(headline, "RACES", dict.fromkeys(headline.RACES, (1e-5, 1e-5, 1)))
    yield
    exact.cache_clear()
    plain.cache_clear()


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(words)


def run(*words: str) -> int:
    return bench.run(arguments(*words), TINY, (3, 2))


@pytest.fixture
def compile_nothing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.compile returns the function itself; the names of what was compiled."""
    compiled = []

    def same(form: Callable, **options: object) -> Callable:
        compiled.append(form.__name__)
        return form

    monkeypatch.setattr(torch, "compile", same)
    return compiled


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_and_json_have_the_same_rows(
    capsys: pytest.CaptureFixture[str], compile_nothing: list[str]
) -> None:
    assert run("--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [(row["batch"], row["passes"]) for row in result["rows"]] == [
        (batch, passes) for batch in (3, 2) for passes in BOTH
    ]
    assert len(compile_nothing) == 8
    for row in result["rows"]:
        assert row["impl"] == capsops.dispatch.automatic("cpu")
        assert row["eager_form"] in row["eager"]
        assert row["compiled_form"] in ("einsum + sums", "einsum")
        others = [*row["eager"].values(), *row["compiled"].values()]
        assert row["ratio"] == pytest.approx(min(others) / row["ours"])
        assert row["share"] > 0
        assert 0 <= row["error"] < 1e-5
    assert result["layer"] == {"I": 7, "J": 3, "D": 16, "K": 8, "T": 3}
    assert result["device"]["threads"] == 1
    assert result["versions"]["torch"] == torch.__version__
    assert result["notes"] == []

    rows = [Row(**{x: row[x] for x in Row.__dataclass_fields__}) for row in result["rows"]]
    printed = report(result, rows, result["notes"]).splitlines()
    assert max(map(len, printed)) <= WIDTH
    assert printed[0] == "capsule_routing, I=7, J=3, D=16, K=8, T=3, impl=auto"
    assert "1 threads" in printed[1]
    table = [cells(line) for line in printed if line.startswith("| B=")]
    assert [line[0] for line in table] == ["B=3 forward", "B=3 + backward", "B=2 forward", "B=2 + backward"]


def test_table_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--quick") == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n| B=") == 4
    assert "- torch.compile: left out by --quick" in printed.out
    assert all(cells(line)[3] == "–" for line in printed.out.splitlines() if line.startswith("| B="))
    assert "B=3 7×3" in printed.err


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench.run, "__defaults__", (TINY, (2,)))
    assert command.main(["bench", "--json", "--quick"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("fast", "got 'fast', takes one of 'auto'"),
        ("cuda", "impl='cuda'"),
    ],
)
def test_a_backend_that_cannot_compute_is_an_error(
    backend: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--backend", backend) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert f"error: --backend {backend}: " in printed.err
    assert reason in printed.err


def test_the_backend_that_is_named_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--backend", "reference", "--json", "--quick") == 0
    result = json.loads(capsys.readouterr().out)
    assert {row["impl"] for row in result["rows"]} == {"reference"}


def test_a_wrong_result_is_an_error_and_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = capsops.capsule_routing
    monkeypatch.setattr(capsops, "capsule_routing", lambda *args, **options: 1.01 * right(*args, **options))
    assert run("--json", "--quick") == 1
    printed = capsys.readouterr()
    assert not printed.out
    assert "error: ours, B=3 7×3, forward: value is off by 1.00e-02" in printed.err


def test_a_wrong_form_of_plain_pytorch_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forms = headline.peers.FORMS["capsule_routing"]
    monkeypatch.setitem(forms, "einsum", lambda *args, **options: 0 * forms["matmul"](*args, **options))
    assert run("--json", "--quick") == 0
    result = json.loads(capsys.readouterr().out)
    assert all("einsum" not in row["eager"] for row in result["rows"])
    assert "einsum, B=3 7×3, forward: not timed: AssertionError" in result["notes"][1]


def test_without_a_compiler_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(form: Callable, **options: object) -> Callable:
        def fails(*args: object, **options: object) -> None:
            raise RuntimeError("no C++ compiler\nand much more")

        return fails

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert run() == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n| B=") == 4
    assert "torch.compile: einsum + sums is not timed: RuntimeError: no C++ compiler\n" in printed.out
    assert printed.err.count("compiling") == 2  # what fails is not tried again


def test_without_time_the_rest_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "SECONDS", -1)
    assert run("--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["rows"]) == 1
    assert "no time for torch.compile of einsum: B=3 7×3, forward" in result["notes"]
    rest = "B=3 7×3, forward + backward; B=2 7×3, forward; B=2 7×3, forward + backward"
    assert result["notes"][-1] == f"no time for the rest: {rest}"


def test_a_busy_machine_is_mentioned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.os, "getloadavg", lambda: (99.5, 0.0, 0.0))
    assert run("--quick") == 0
    assert "- the machine was busy, with a load of 99.5 on " in capsys.readouterr().out


def test_the_ceiling_is_the_larger_of_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = [Ceiling(3e9, "a loop"), Ceiling(6e9, "a loop")]

    def ceiling() -> Ceiling:
        return measured.pop(0)

    ceiling.cache_clear = lambda: None
    monkeypatch.setattr(bench, "measured_ceiling", ceiling)
    assert run("--json", "--quick") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ceilings"] == {"float32": 6e9}
    for row in result["rows"]:
        case = replace(TINY, batch=row["batch"])
        assert row["share"] == pytest.approx(operations(case, row["passes"]).flops / row["ours"] / 6e9)


def test_budget_keeps_time_for_one_form_of_each_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headline, "CASE_SECONDS", 2)
    clock = SimpleNamespace(now=0.0)
    budget = Budget(40, 4, lambda: clock.now)
    assert budget.compiles(first=True)
    budget.compilation = 8
    assert budget.compiles(first=False)  # 4 × 2 + 4 × 8 = 40
    clock.now = 0.1
    assert not budget.compiles(first=False)
    clock.now = 24
    assert budget.compiles(first=True)
    clock.now = 24.1
    assert not budget.compiles(first=True)
    assert not budget.over()
    clock.now = 40.1
    assert budget.over()


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:x", "cuda:99"])
def test_a_device_that_is_not_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments("--device", name)
    assert f"argument --device: got '{name}', " in capsys.readouterr().err


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine whose CPU passes for a GPU that serves the reference."""
    properties = SimpleNamespace(name="Card", multi_processor_count=132, major=9, minor=0, gcnArchName="")
    device = SimpleNamespace(type="cuda")
    ceilings = {"bandwidth": 4e12, "bfloat16": 8e14, TF32: 4e14, "float32": 5e13, "exponentials": 4e12}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(bench, "measured_ceilings", lambda device: ceilings)
    monkeypatch.setattr(bench.dispatch, "requested", lambda backend, device: backend)
    monkeypatch.setattr(bench, "backend_of", lambda *args: "reference")
    monkeypatch.setattr(headline, "backend_of", lambda *args: "reference")
    monkeypatch.setattr(headline, "input_sets", lambda case, device: [case.inputs()] * 2)
    monkeypatch.setattr(headline, "exact", lambda case, passes, device: exact(case, passes))
    monkeypatch.setattr(headline, "plain", lambda case, passes, device: plain(case, passes))
    monkeypatch.setattr(headline, "memory_of", lambda call, device: len(call()) << 20)
    monkeypatch.setattr(headline, "clock", lambda call, calls, device: headline_clock(call, calls))
    monkeypatch.setattr(headline, "replay_seconds", lambda call: [call() or 3e-4, 2e-4, 1e-4])
    return device


def headline_clock(call: Callable[[], object], calls: int) -> float:
    call()
    return 1e-3 * calls


def test_on_a_gpu(
    gpu: SimpleNamespace, compile_nothing: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments("--json")
    args.device = gpu
    assert bench.run(args, TINY, (3, 2)) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["rows"]) == 2 * 2 * 2 * 2
    first, second = result["rows"][:2]
    assert (first["precision"], first["timed_by"], second["timed_by"]) == (TF32, REPLAY, CALLS)
    assert first["ours"] == pytest.approx(2e-4 / 2)  # a sample is a call with each of the sets
    assert second["ours"] == pytest.approx(1e-3 / 2)
    assert first["memory"]["ours"] == 1 << 20
    assert set(first["compiled"]) == {"einsum + sums", "matmul"}
    assert first["limit"] in ("sums", "bytes", "matrix products", "exponentials")
    assert "impl=auto takes plain PyTorch here" in result["notes"][0]

    args.json = False
    assert bench.run(args, TINY, (3, 2)) == 0
    printed = capsys.readouterr().out
    assert "132 multiprocessors, sm_90" in printed
    assert printed.count("timed by") == 4
    assert "bfloat16, timed by graph replay; ours: reference" in printed
    assert max(map(len, printed.splitlines())) <= WIDTH


def test_on_a_gpu_without_triton(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench.sys.modules, "triton", None)
    args = arguments("--json", "--quick")
    args.device = gpu
    assert bench.run(args, TINY, (3,)) == 0
    result = json.loads(capsys.readouterr().out)
    assert {row["timed_by"] for row in result["rows"]} == {CALLS}
    assert result["versions"]["triton"] is None
    assert "no graph replay, which needs Triton: it cannot be imported" in result["notes"]


def test_the_widest_table_fits() -> None:
    slow = Row(
        batch=128,
        passes=FORWARD_BACKWARD,
        precision=TF32,
        timed_by=REPLAY,
        impl="cuda",
        ours=1.2345,
        eager={"matmul": 9.999},
        compiled={"matmul": 9.888},
        share=0.12,
        limit="sums",
        error=1e-3,
        memory={"ours": 99 << 20, "matmul": 9999 << 20},
    )
    fast = replace(slow, passes=FORWARD, ours=1.23456e-4, eager={"einsum + sums": 0.01}, compiled={})
    facts = {
        "op": "capsule_routing",
        "layer": {"I": 1152},
        "impl": "auto",
        "precisions": (TF32, "bfloat16"),
        "device": {"type": "cuda", "model": "NVIDIA RTX " * 9, "multiprocessors": 188, "isa": "sm_120"},
        "ceilings": {TF32: 4e14, "bfloat16": 8e14, "bandwidth": 4e12},
        "versions": dict.fromkeys(("capsops", "torch", "triton", "system"), "2.11.0.dev20261129+cu130"),
        "date": "2026-12-01T10:00:00",
    }
    lines = report(facts, [slow, fast], ["a note of many words " * 20]).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert [cells(line)[:4] for line in lines if line.startswith("| B=")] == [
        ["B=128 + backward", "1234 ms", "9999 ms matmul", "9888 ms matmul"],
        ["B=128 forward", "0.123 ms", "10 ms sums", "–"],
    ]
