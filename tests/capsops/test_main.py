"""`python -m capsops` and its report, info."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import capsops
from capsops import __main__ as command
from capsops import dispatch, info
from capsops.backends import extension
from capsops.backends.backend import MASK
from capsops.backends.device import Device
from capsops.command_line import table
from capsops.proofs import standing
from capsops.proofs.scope import Scope, every_op
from capsops.proofs.standing import CHECKED as CHECKED_HERE
from capsops.proofs.standing import SHIPPED, Standing
from tests.processes import run_python

MAPS = """\
7f1000000000-7f1000001000 r--p 00000000 fe:00 1 /usr/lib/python3/site-packages/torch/lib/libgomp.so.1
7f1000001000-7f1000002000 r-xp 00001000 fe:00 1 /usr/lib/python3/site-packages/torch/lib/libgomp.so.1
7f1000002000-7f1000003000 rw-p 00000000 00:00 0
7f1000003000-7f1000004000 r--p 00000000 fe:00 2 /opt/a folder/libiomp5.so
7f1000004000-7f1000005000 r--p 00000000 fe:00 3 /usr/lib/torch.libs/libgomp-24e2ab19.so.1.0.0
7f1000005000-7f1000006000 r--p 00000000 fe:00 4 /usr/lib/libcompress.so
7ffc00000000-7ffc00001000 rw-p 00000000 00:00 0 [stack]
"""


def test_openmp_runtimes_of_a_process() -> None:
    assert info.openmp_runtimes(MAPS) == [
        "/opt/a folder/libiomp5.so",
        "/usr/lib/python3/site-packages/torch/lib/libgomp.so.1",
        "/usr/lib/torch.libs/libgomp-24e2ab19.so.1.0.0",
    ]


def test_several_openmp_runtimes_give_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for runtimes, expected in (
        (["/a/libgomp.so.1"], "/a/libgomp.so.1, shared with torch"),
        (["/a", "/b"], "2 runtimes in one process, whose threads may compete: /a, /b"),
    ):
        monkeypatch.setattr(info, "openmp_runtimes", lambda maps, runtimes=runtimes: runtimes)
        assert info.openmp() == expected


def test_columns_are_aligned() -> None:
    assert table([("a", "bb", ""), ("ccc", "d", "e f")]) == "  a    bb\n  ccc  d   e f"


def test_a_missing_extension_is_reported_with_its_reason_and_remedy() -> None:
    record = {"cpu": {"built": False, "reason": "line one\nline two", "remedy": "do this"}}
    assert info.extension("cpu", record) == [
        ("capsops._cpu", "not built: line one"),
        ("", "line two"),
        ("", "to fix it: do this"),
    ]
    assert info.extension("cuda", {})[-1] == ("", "to fix it: pip install -e .")


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    command.main([])
    report = capsys.readouterr().out
    assert report.startswith(f"capsops {capsops.__version__}\n")
    for service in dispatch.describe():
        assert any(
            line.split()[:2] == [service.impl, service.device]
            and line.endswith("available" if service.available else service.reason.splitlines()[0])
            for line in report.splitlines()
        )
    assert f"  cpu   {dispatch.automatic('cpu')}\n" in report


GPU = Device("cuda", "Card", 1, "580.1", (9, 0), 80 << 30, "uuid")
CHECKED = (
    "not proved here yet: the first call checks it in a process of its own, at most 60 s, and is served by"
    " it if all was right; `python -m capsops check` does so now"
)


@pytest.mark.parametrize(
    ("known", "no_check", "lines"),
    [
        (
            {"cuda": None, "triton": None},
            "",
            [
                f"cuda: {CHECKED}",
                f"triton: {CHECKED.replace('call', 'call that the kernels above do not serve', 1)}",
            ],
        ),
        (
            {"cuda": None, "triton": Standing(why_not="Triton is not installed")},
            "CAPSOPS_CHECK is 0",
            [
                "cuda: not proved, and the first call will not check it: CAPSOPS_CHECK is 0",
                "triton: not used: Triton is not installed",
            ],
        ),
        (
            {
                "cuda": Standing(Scope(every_op(), (32, 64)), SHIPPED),
                "triton": Standing(Scope(every_op((MASK,))), CHECKED_HERE, "its kernels failed the check: x"),
            },
            "",
            [
                f"cuda: {SHIPPED}, without options of routing, D up to 32 and K up to 64",
                f"triton: {CHECKED_HERE}; its kernels failed the check: x",
            ],
        ),
    ],
)
def test_report_of_a_gpu(
    known: dict[str, Standing | None], no_check: str, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first call will do there, without doing it."""
    monkeypatch.setattr(standing, "known", lambda backend, device: known[backend.name])
    monkeypatch.setattr(standing, "why_no_check", lambda device: no_check)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(dispatch, "device_facts", lambda device: GPU)
    expected = ["Card, driver 580.1, 80 GiB", *lines]
    assert [line for _, line in info.on_gpu(GPU)][:-1] == expected
    for line in expected:
        assert line in info.text()
    assert info.report()["auto"]["cuda:1"][:-1] == expected


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report says so, before a call fails."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(info, "driver_cuda", lambda: "12.8")
    monkeypatch.setitem(sys.modules, "capsops._cuda", SimpleNamespace(device_count=lambda: 0))
    record = {"cuda": {"built": True, "compiler": "nvcc 13.0", "archs": "90", "toolkit": "13.0"}}
    rows = [line for _, line in info.extension("cuda", record)]
    assert rows[-2].startswith("the NVIDIA driver supports CUDA 12.8, and the kernels were built with 13.0")
    assert rows[-1].startswith("to fix it: update the driver")


@pytest.mark.parametrize("command_name", ["info", "check", "bench"])
def test_commands_have_help(command_name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main([command_name, "--help"])
    assert end.value.code == 0
    assert f"`python -m capsops {command_name}`" in capsys.readouterr().out


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(["prove"])
    assert end.value.code == 2
    assert "invalid choice: 'prove'" in capsys.readouterr().err


def test_report_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["capsops"] == capsops.__version__
    assert report["auto"]["cpu"] == dispatch.automatic("cpu")


def test_a_damaged_build_record_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "backends" / "extension.py"))
    for text in ('{"cpu": {"built"', '{"cpu": null}', '{"cpu": {}}', "[1]", "\xff"):
        (tmp_path / "_build.json").write_bytes(text.encode("latin-1"))
        command.main([])
        assert "not built: the build record _build.json cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("impl_variable", "cpu", "cuda"),
    [
        ("reference", "reference", "reference"),
        ("triton", "nothing: impl='triton' ", None),
        ("cuda", "nothing: impl='cuda' ", None),
        ("cpu", None, "nothing: impl='cpu' "),
    ],
)
def test_report_with_capsops_impl_set(impl_variable: str, cpu: str | None, cuda: str | None) -> None:
    done = run_python("-m", "capsops", CAPSOPS_IMPL=impl_variable, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    last = done.stdout[done.stdout.index('impl="auto" takes') :].splitlines()
    assert last[0] == f'impl="auto" takes, because CAPSOPS_IMPL is {impl_variable}'
    for device, line, expected in zip(("cpu", "cuda"), last[1:], (cpu, cuda), strict=True):
        assert line.startswith(f"  {device:4}  {expected or ''}")
