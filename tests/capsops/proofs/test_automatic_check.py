"""The check at the first call with impl="auto": a real process, which may fail in every way.

Whatever happens to it, the user's call returns the right result.
"""

import contextlib
import os
import signal
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock

from capsops import dispatch
from capsops.backends.backend import SHARED, UNSQUASHED
from capsops.backends.device import Device
from capsops.proofs import child, records, standing
from capsops.proofs.scope import PLAIN, every_op
from tests.tiers import fast_only

RECORDED = {
    "wrong": "value is off by 1.00e-02 of its norm",
    "NaN": "value is off by nan of its norm",
    "restless": "two calls differ",
    "exception": "RuntimeError: too many resources requested for launch",
    "segmentation fault": "ended the process by SIGSEGV",
    "abort": "ended the process by SIGABRT",
    "exit": "ended the process with status 3",
}
NOT_RECORDED = {
    "no memory": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
    "no host memory": "MemoryError: std::bad_alloc",
    "killed": "the process that checks was ended by SIGKILL",
}
FAST = ("wrong", "segmentation fault", "no memory")


def faults(kinds: dict[str, str]) -> list:
    return fast_only([(name, kinds[name]) for name in FAST if name in kinds], list(kinds.items()))


def test_kernels_that_are_right_serve_from_the_first_call_on(user: SimpleNamespace) -> None:
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert user.call()
    assert user.serves() == "cpu"
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers
    said = user.said()
    assert said.startswith("capsops: checking the cpu kernels on ")
    assert said.count("\n") == 1
    assert "right (" in said
    record = user.recorded()
    assert record.complete
    assert not record.fault
    assert {op for op, _, _ in record.results} == {
        "squash", "predictions", "dynamic_routing", "capsule_routing", "couplings",
    }  # fmt: skip
    user.forget()
    assert user.serves() == "cpu"
    assert user.said() == "", "a record needs no second check"
    user.kernels("2")
    user.forget()
    assert dispatch.BACKENDS["cpu"].code() == "2"
    assert standing.known(dispatch.BACKENDS["cpu"], user.device) is None, "other kernels are not proved"


@pytest.mark.parametrize(("fault", "why"), faults(RECORDED))
def test_what_is_wrong_with_the_kernels_is_recorded(fault: str, why: str, user: SimpleNamespace) -> None:
    user.fault(fault)
    with pytest.warns(UserWarning, match="plain PyTorch, which is slower, serves") as caught:
        assert user.call()
    assert why in str(caught[0].message)
    assert "What to do: " in str(caught[0].message)
    assert user.serves() == "reference"
    u_hat = ((4, 5, 3, 4),)
    for op in ("dynamic_routing", "dynamic_routing_backward"):
        others = dispatch.chosen(op, "auto", torch.device("cpu"), torch.float32, u_hat).name
        assert others == ("reference" if "ended the process" in why else "cpu")
    assert any(why in line for line in user.recorded().wrong())
    user.forget()
    user.said()
    with pytest.warns(UserWarning, match="failed the check") as caught:
        assert all(user.call() for _ in range(2))
    assert len(caught) == 1, "one warning"
    assert user.said() == "", "no second check"


@pytest.mark.parametrize(("fault", "why"), faults(NOT_RECORDED))
def test_what_is_no_fault_of_the_kernels_is_not_recorded(fault: str, why: str, user: SimpleNamespace) -> None:
    user.fault(fault)
    with pytest.warns(UserWarning, match="the check did not end") as caught:
        assert user.call()
    assert why in str(caught[0].message)
    assert "python -m capsops check" in str(caught[0].message)
    assert user.recorded() is None
    user.fault("")
    user.forget()
    assert user.serves() == "cpu", "the next process checks again"


def test_a_kernel_that_never_ends(user: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "LIMIT", 10.0)
    user.fault("hang")
    with pytest.warns(UserWarning, match="it was not done in time"):
        assert user.call()
    assert user.recorded() is None
    assert not children(), "the process that hangs is ended"


def children() -> list[int]:
    """Processes that this one started to check, and that have not ended."""
    mine = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid() and b"capsops.check" in (process / "cmdline").read_bytes():
                mine.append(int(process.name))
    return mine


def test_a_damaged_record_is_replaced(user: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def right(request: child.Request, *_: object, **__: object) -> child.Outcome:
        return child.Outcome(records.Record(request.key, dict.fromkeys(every_op(), ""), complete=True), "")

    monkeypatch.setattr(child, "run", right)
    path = records.path(records.key(dispatch.BACKENDS["cpu"], user.device))
    path.parent.mkdir(parents=True)
    for damaged in (b"\xff", b"[]", b"{}", b'{"format": 1, "key": {}}', b'{"format": 2'):
        path.write_bytes(damaged)
        assert user.recorded() is None
        assert standing.known(dispatch.BACKENDS["cpu"], user.device) is None
        user.forget()
        assert user.serves() == "cpu"
        assert user.recorded().complete


@pytest.mark.slow
def test_a_check_that_was_cut_short_goes_on(user: SimpleNamespace) -> None:
    """In the next process, with what is left."""
    key = records.key(dispatch.BACKENDS["cpu"], user.device)
    done = {("capsule_routing", "float32", option): "" for option in (PLAIN, UNSQUASHED, SHARED)}
    records.write(records.Record(key, dict(done)))
    user.fault("abort")  # in an op that needs no further check
    assert user.serves() == "cpu"
    assert user.recorded().complete
    assert done.items() < user.recorded().results.items()


REASONS = {
    "CAPSOPS_CHECK is 0": lambda patch: patch.setenv("CAPSOPS_CHECK", "0"),
    "the first call was traced": lambda patch: patch.setattr(torch.jit, "is_tracing", lambda: True),
    "the first call was in a worker of a DataLoader": lambda patch: patch.setattr(
        torch.utils.data, "get_worker_info", lambda: SimpleNamespace(id=0)
    ),
    "this interpreter is frozen or embedded": lambda patch: patch.setattr(sys, "executable", "/opt/blender"),
    "the cache folder cannot be written": lambda patch: patch.setenv("XDG_CACHE_HOME", "/proc/none"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_where_no_check_may_begin(
    reason: str, user: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    REASONS[reason](monkeypatch)
    monkeypatch.setattr(child, "run", None)
    with pytest.warns(UserWarning, match=reason) as caught:
        assert user.call()
    remedy = "set XDG_CACHE_HOME to" if "cache" in reason else "run `python -m capsops check`"
    assert f"What to do: {remedy}" in str(caught[0].message)
    assert user.serves() == "reference"
    assert user.said() == ""


GPU = Device("cuda", "Card", 1, "580.1", (9, 0), 80 << 30, "0a1b")


@pytest.mark.parametrize(
    ("capturing", "mode", "mps", "reason"),
    [
        (True, 0, False, "inside the capture of a CUDA graph; call capsops.warm_up()"),
        (False, 3, False, "exclusive compute mode"),
        (False, 0, True, "shared by NVIDIA's MPS"),
        (False, 0, False, ""),
    ],
)
def test_where_no_check_may_begin_on_a_gpu(
    capturing: bool,
    mode: int,
    mps: bool,
    reason: str,
    user: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(standing, "capturing", lambda: capturing)
    monkeypatch.setattr(standing, "compute_mode", lambda index: mode)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    if mps:
        (tmp_path / "control").touch()
    said = standing.why_no_check(GPU)
    assert reason in said
    assert bool(said) == bool(reason)


def test_the_environment_of_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMPI_COMM_WORLD_RANK", "PMI_RANK",
                "PMIX_ID", "SLURM_PROCID", "TORCHELASTIC_RUN_ID", "GROUP_RANK")  # fmt: skip
    for name in (*launched, "CAPSOPS_IMPL", "RANKING"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    environment = child.environment(GPU)
    assert not environment.keys() & {*launched, "CAPSOPS_IMPL"}
    assert environment["RANKING"] == "1"
    assert environment["CAPSOPS_CHECK"] == "0"
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-0a1b"
    assert child.visible_device(GPU, "MIG-a,MIG-b") == "MIG-b"
    assert child.environment(Device("cpu", "Processor"))["CUDA_VISIBLE_DEVICES"] == "3,5"


def test_another_process_that_checks_is_waited_for(
    user: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "LIMIT", 0.5)
    monkeypatch.setattr(child, "run", None)
    with (
        FileLock(standing._lock_file()),
        pytest.warns(UserWarning, match="another process was at it for more than"),
    ):
        assert user.call()
    assert "another process is checking kernels" in user.said()


def test_an_interrupt_ends_the_check(user: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C does, which the process that checks does not get, being in another session."""
    user.fault("hang")
    handler = signal.getsignal(signal.SIGALRM)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 6)
    try:
        with pytest.raises(KeyboardInterrupt):
            user.call()
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert user.said().endswith("stopped\n")
    assert not children()
    assert user.recorded() is None
    assert ("cpu", user.device) not in dispatch._standings.settled, "the next call asks again"
