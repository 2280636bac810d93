"""A check in a process of its own, whose end, whatever it is, is only a result here.

The child is Python started anew, never a copy of this process: a kernel that writes where it should not, or
that never ends, takes nothing else with it. It has a session of its own, and reads this process's sys.path,
the request and, to learn that this process has ended, the end of a pipe. It writes a line as soon as
something is known (capsops/check.py); here these lines and its exit become a record.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from capsops.backends.backend import Backend
from capsops.backends.device import Device
from capsops.proofs.records import Record

# Variables that tell a process of its part in a group that a launcher started.
LAUNCHER = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|GROUP_WORLD_SIZE|MASTER_(ADDR|PORT)"
    r"|(TORCHELASTIC|PMI|PMIX|OMPI|SLURM|MPI|MPIR|MV2|I_MPI|HYDRA|FLUX|PALS)_?.*"
)

# The status with which a child ends where something other than the kernels went wrong.
NOT_THE_KERNELS = 75

# Ends that say nothing of the kernels: of who runs out of memory or of time, or is stopped by hand.
_OUTSIDE = {"SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGXCPU", "SIGALRM"}


Progress = Callable[[list[dict[str, Any]]], None]


class Request(NamedTuple):
    """What a child is to check.

    Attributes:
        key: of the record; a child that sees another device or other kernels stops.
        device: as the child names it.
        until: the time (time.time()) after which it begins nothing new; None: no limit.
        done: calls that need no check.
        thorough: every option on every shape, not only what the automatic check tries.
    """

    key: dict[str, str]
    device: str
    until: float | None
    done: list[list[str]]
    thorough: bool = False


class Outcome(NamedTuple):
    """A record as far as the check came, why it did not come further, and the child's lines."""

    record: Record
    unfinished: str  # empty where it came to its end
    lines: Sequence[dict[str, Any]] = ()


def jobs(backend: Backend, device: Device, thorough: bool = False) -> int:
    """How many processes check side by side: several where each kernel has to be compiled first, or on a GPU
    most of the work is the host's."""
    several = backend.compiles or (thorough and device.type == "cuda")
    return max(1, min(4, (os.cpu_count() or 1) // 2)) if several else 1


def name_there(device: Device) -> str:
    """What a child, which sees this one GPU, calls the device."""
    return "cuda:0" if device.type == "cuda" and device.uuid else device.torch_name


def environment(device: Device) -> dict[str, str]:
    """That of a child: of no launcher, with this one GPU, and without checks or choices of its own."""
    kept = {name: value for name, value in os.environ.items() if not LAUNCHER.fullmatch(name)}
    for name in ("CAPSOPS_IMPL", "CAPSOPS_RECORD", "CUDA_ENABLE_COREDUMP_ON_EXCEPTION", "PYTHONWARNINGS"):
        kept.pop(name, None)
    kept["CAPSOPS_CHECK"] = "0"
    if device.type == "cuda" and device.uuid:
        kept["CUDA_VISIBLE_DEVICES"] = visible_device(device, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    return kept


def visible_device(device: Device, visible: str) -> str:
    """How CUDA_VISIBLE_DEVICES names the GPU; a part of one (MIG) as this process's own variable does."""
    entries = visible.split(",")
    own = entries[device.number].strip() if device.number < len(entries) else ""
    return own if own.startswith("MIG-") else f"GPU-{device.uuid.removeprefix('GPU-')}"


def run(
    request: Request,
    device: Device,
    timeout: float | None = None,
    progress: Progress | None = None,
    jobs: int = 1,
) -> Outcome:
    """Runs a check in `jobs` processes, and waits for it at most `timeout` seconds.

    `progress` gets the lines so far, now and then.

    Raises:
        OSError: a process cannot be started here, or a temporary file not be written.
    """
    with tempfile.TemporaryDirectory(prefix="capsops-check-") as folder:
        children: list[_Child] = []
        try:
            for n in range(jobs):
                children.append(_Child(Path(folder), request, (n, jobs), device))
            end = None if timeout is None else time.monotonic() + timeout
            while any(child.process.poll() is None for child in children):
                if end is not None and time.monotonic() > end:
                    break
                time.sleep(0.05 if progress is None else 0.5)
                if progress is not None:
                    progress([line for child in children for line in _read(child.lines)])
        finally:
            for child in children:
                child.end()
        return _together(request, [child.outcome(request) for child in children])


class _Child:
    """One process that checks its share of what was asked for."""

    def __init__(self, folder: Path, request: Request, share: tuple[int, int], device: Device) -> None:
        self.lines, self.log = (folder / f"{name}-{share[0]}" for name in ("lines.jsonl", "log.txt"))
        self.lines.touch()
        # Nothing is imported before sys.path is this process's: not even what lies in the current folder.
        path = [entry for entry in sys.path if isinstance(entry, str)]  # Python ignores others
        code = f"import sys; sys.path[:] = {path!r}; from capsops.check import child; child()"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(device),
                start_new_session=True,
            )
        self.in_time = True
        values = {"share": share, "lines": str(self.lines)}
        assert self.process.stdin is not None
        # A child that has ended already says so by its status.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({**request._asdict(), **values}).encode() + b"\n")
            self.process.stdin.flush()  # and stays open: its end tells the child that this process has ended

    def end(self) -> None:
        """Ends the process, and what it started, if it has not ended."""
        if self.process.poll() is None:
            self.in_time = False
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
            self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()

    def outcome(self, request: Request) -> Outcome:
        status = self.process.returncode if self.in_time else None
        if status == 0 and _statuses_are_ignored():
            status = NOT_THE_KERNELS  # the system does not say how it ended
        return concluded(request, _read(self.lines), status, _last_line(self.log))


def _together(request: Request, outcomes: Sequence[Outcome]) -> Outcome:
    """The outcomes of shares of one check, which have no call in common."""
    record = Record(request.key, complete=all(outcome.record.complete for outcome in outcomes))
    for outcome in outcomes:
        record.results |= outcome.record.results
        record.fault = record.fault or outcome.record.fault
    unfinished = "" if record.fault else next((x.unfinished for x in outcomes if x.unfinished), "")
    return Outcome(record, unfinished, [line for outcome in outcomes for line in outcome.lines])


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines; the last may be cut short, where the child ended as it wrote it."""
    read = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            read.append(json.loads(line))
    return read


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it printed nothing"


def _statuses_are_ignored() -> bool:
    return hasattr(signal, "SIGCHLD") and signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN


def _signal_name(number: int) -> str:
    known = {each.value: each.name for each in signal.Signals}
    return known.get(number, f"signal {number}")


def concluded(
    request: Request, lines: Sequence[dict[str, Any]], status: int | None, last_line: str
) -> Outcome:
    """What the lines of a child and its exit status, None where its time was over, say of the kernels."""
    record, running, stopped = Record(request.key), "", ""
    for line in lines:
        running = line.get("running", running)
        stopped = line.get("stopped", stopped)
        record.fault = line.get("fault", record.fault)
        record.complete = line.get("complete", record.complete)
        for op, dtype, option, wrong in line.get("results", ()):
            record.results[op, dtype, option] = wrong
    if record.complete or record.fault:
        return Outcome(record, "", lines)
    if stopped:
        return Outcome(record, stopped, lines)
    if status is None:
        return Outcome(record, f"it was not done in time{f', in {running}' if running else ''}")
    how = f"with status {status}"
    if status < 0:
        how = f"by {_signal_name(-status)}"
    if status == NOT_THE_KERNELS:
        return Outcome(record, f"the process that checks failed: {last_line}", lines)
    if not running:
        return Outcome(record, f"the process that checks could not start: it ended {how}: {last_line}")
    if how.removeprefix("by ") in _OUTSIDE:
        return Outcome(record, f"the process that checks was ended {how}, in {running}")
    record.fault = f"{running} ended the process {how}"
    return Outcome(record, "", lines)
