"""The report of `python -m capsops`."""

from pathlib import Path

import pytest
import torch

import capsops
from capsops import __main__ as main
from capsops import dispatch
from capsops.backends import extension
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
    assert main.openmp_runtimes(MAPS) == [
        "/opt/a folder/libiomp5.so",
        "/usr/lib/python3/site-packages/torch/lib/libgomp.so.1",
        "/usr/lib/torch.libs/libgomp-24e2ab19.so.1.0.0",
    ]


def test_several_openmp_runtimes_give_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for runtimes, expected in (
        (["/a/libgomp.so.1"], "/a/libgomp.so.1, shared with torch"),
        (["/a", "/b"], "2 runtimes in one process, whose threads may compete: /a, /b"),
    ):
        monkeypatch.setattr(main, "openmp_runtimes", lambda maps, runtimes=runtimes: runtimes)
        assert main.openmp() == expected


def test_columns_are_aligned() -> None:
    assert main.table([("a", "bb", ""), ("ccc", "d", "e f")]) == "  a    bb\n  ccc  d   e f"


def test_a_missing_extension_is_reported_with_its_reason_and_remedy() -> None:
    record = {"cpu": {"built": False, "reason": "line one\nline two", "remedy": "do this"}}
    assert main.extension("cpu", record) == [
        ("capsops._cpu", "not built: line one"),
        ("", "line two"),
        ("", "to fix it: do this"),
    ]
    assert main.extension("cuda", {})[-1] == ("", "to fix it: pip install -e .")


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    main.main()
    report = capsys.readouterr().out
    assert report.startswith(f"capsops {capsops.__version__}\n")
    for service in dispatch.describe():
        assert any(
            line.split()[:2] == [service.impl, service.device]
            and line.endswith("available" if service.available else service.reason.splitlines()[0])
            for line in report.splitlines()
        )
    assert f"  cpu   {dispatch.automatic('cpu')}\n" in report


def test_report_of_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    names = {"cuda:0": "cuda", "cuda:1": "reference", "cpu": "cpu"}
    monkeypatch.setattr(
        dispatch, "chosen", lambda op, impl, device, dtype: dispatch.BACKENDS[names[str(device)]]
    )
    monkeypatch.setattr(
        dispatch, "why_not_proved", lambda backend, model, _: f"{backend.name} is too old\nfor {model}"
    )
    main.main()
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "  cuda:0  cuda, on Card 0",
        "  cuda:1  reference, on Card 1",
        "          not cuda: cuda is too old",
        "          not triton: triton is too old",
    ]


def test_a_damaged_build_record_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "backends" / "extension.py"))
    for text in ('{"cpu": {"built"', '{"cpu": null}', '{"cpu": {}}', "[1]", "\xff"):
        (tmp_path / "_build.json").write_bytes(text.encode("latin-1"))
        main.main()
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
