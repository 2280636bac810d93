"""Whether a backend's kernels are proved on a device, and if nothing says so yet, the automatic check.

The first call with impl="auto" on a device asks settle(), once for each backend that may serve it, and the
answer stays as long as the process lives. Nothing is timed here.
"""

import contextlib
import ctypes
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout

from capsops.backends.backend import Backend
from capsops.backends.device import Device
from capsops.graph_capture import capturing
from capsops.proofs import child, records, shipped
from capsops.proofs.records import Record
from capsops.proofs.scope import NOTHING, Scope

LIMIT = 60.0  # seconds: of a check, import included, and of waiting for that of another process

SHIPPED = "proved by a row that ships with capsops"
CHECKED = "proved by a check on this machine"

_BY_HAND = "run `python -m capsops check`, which proves them on this machine"
_WRITABLE = "set XDG_CACHE_HOME to a folder that can be written"


class Standing(NamedTuple):
    """What is proved of a backend's kernels on a device.

    Attributes:
        scope: the calls that they may serve.
        proof: what proves them; empty where nothing does.
        why_not: why they serve nothing, or not everything; empty where they do.
        remedy: what helps; empty where nothing does, or nothing is needed.
    """

    scope: Scope = NOTHING
    proof: str = ""
    why_not: str = ""
    remedy: str = ""


def known(backend: Backend, device: Device) -> Standing | None:
    """What is known without a check; None where a check would have to tell."""
    if reason := backend.unavailable or backend.why_not_on(device):
        return Standing(why_not=reason)
    record = records.read(records.key(backend, device))
    if record is not None and (record.complete or record.fault):  # what was seen here counts most
        return _of(record)
    proof = shipped.proof(device.model, backend.name, backend.kernels(device))
    return None if proof is None else Standing(proof.scope, SHIPPED)


def settle(backend: Backend, device: Device) -> Standing:
    """What is known, or what a check in a process of its own tells now."""
    if standing := known(backend, device):
        return standing
    key = records.key(backend, device)
    before = records.read(key) or Record(key)
    if reason := why_no_check(device):
        remedy = _WRITABLE if reason == records.why_not_writable() else _BY_HAND
        return _of(before, f"its kernels were not checked: {reason}", remedy)
    title = f"the {backend.name} kernels on {device.model}"
    try:
        with _lock(0):
            return known(backend, device) or _check(backend, device, before, title)
    except Timeout:
        _say(f"capsops: another process is checking kernels; waiting for it, at most {LIMIT:.0f} s")
    except OSError as error:
        return _of(before, f"its kernels were not checked: no process could be started for it ({error})")
    reason = f"another process was at it for more than {LIMIT:.0f} s"
    try:
        with _lock(LIMIT):
            return known(backend, device) or _check(backend, device, records.read(key) or before, title)
    except Timeout:
        pass
    except OSError as error:
        reason = f"no process could be started for it ({error})"
    now = known(backend, device)
    return now or _of(records.read(key) or before, f"its kernels were not checked: {reason}")


def _check(backend: Backend, device: Device, before: Record, title: str) -> Standing:
    begin = time.monotonic()
    _say(f"capsops: checking {title} once, in a process of its own, at most {LIMIT:.0f} s … ", end="")
    done = [list(call) for call in before.results]
    request = child.Request(before.key, child.name_there(device), time.time() + LIMIT - 5, done)
    try:
        record, unfinished, _ = child.run(request, device, LIMIT, jobs=child.jobs(backend, device))
    except BaseException:
        _say("stopped")
        raise
    record.results = {**before.results, **record.results}
    seconds = f"{time.monotonic() - begin:.0f} s"
    note = ""
    if record.results or record.fault:
        try:
            records.write(record)
        except OSError as error:
            note = f"; the record cannot be written ({error})"
    standing = _of(record, unfinished and f"the check did not end: {unfinished}")
    _say(f"{standing.why_not or 'right'} ({seconds}){note}")
    return standing


def _of(record: Record, unfinished: str = "", remedy: str = _BY_HAND) -> Standing:
    """The standing that a record gives; `unfinished`: why it is not complete, and `remedy` what helps."""
    scope, wrong = record.scope(), record.wrong()
    proof = CHECKED if scope.calls else ""
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        report = "please report it with what `python -m capsops check` prints"
        return Standing(scope, proof, f"its kernels failed the check: {wrong[0]}{more}", report)
    if unfinished:
        return Standing(scope, proof, unfinished, remedy)
    return Standing(scope, proof)


def why_no_check(device: Device) -> str:
    """Why no check may begin here and now; empty where one may."""
    if os.environ.get("CAPSOPS_CHECK") == "0":
        return "CAPSOPS_CHECK is 0"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "the first call was traced"
    if device.type == "cuda" and capturing():
        return "the first call was inside the capture of a CUDA graph; call capsops.warm_up() before it"
    if torch.utils.data.get_worker_info() is not None:
        return "the first call was in a worker of a DataLoader"
    if getattr(sys, "frozen", False) or not _is_python(sys.executable):
        return "this interpreter is frozen or embedded, and cannot start another"
    if device.type == "cuda" and (reason := _why_not_shared(device)):
        return reason
    return records.why_not_writable()


def _is_python(executable: str | None) -> bool:
    """Whether sys.executable is Python, not a program that embeds it."""
    return re.match(r"python|pypy", Path(executable or "").name.lower()) is not None


def _why_not_shared(device: Device) -> str:
    """Why a second process, or a fault in it, would disturb the GPU's users."""
    # The default of NVIDIA's own daemon, on every Linux (Multi-Process Service documentation).
    pipe = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps")
    if (pipe / "control").exists():
        return "the GPU is shared by NVIDIA's MPS, where a fault of one process ends the others"
    if compute_mode(device.number) in (2, 3):
        return "the GPU is in exclusive compute mode, in which a second process cannot use it"
    return ""


def compute_mode(index: int) -> int:
    """The GPU's compute mode as CUDA numbers it: 0 default, 2 prohibited, 3 exclusive; 0 where unknown."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    mode, attribute = ctypes.c_int(0), 20  # CU_DEVICE_ATTRIBUTE_COMPUTE_MODE
    return mode.value if driver.cuDeviceGetAttribute(ctypes.byref(mode), attribute, index) == 0 else 0


@contextlib.contextmanager
def _lock(timeout: float) -> Iterator[None]:
    """Holds the lock; Timeout after so many seconds, OSError where the system has no locks of files."""
    lock = FileLock(_lock_file())
    try:
        lock.acquire(timeout=timeout, poll_interval=0.1)
    except NotImplementedError as error:
        raise OSError(f"no locks of files: {error}") from error
    try:
        yield
    finally:
        lock.release()


def _lock_file() -> Path:
    """One for each host and user: the folder for temporary files is the host's own."""
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    return Path(tempfile.gettempdir(), f"capsops-check-{user}.lock")


def _say(text: str, end: str = "\n") -> None:
    """A line on stderr, if there is one that works; without one no call may fail."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            print(text, end=end, file=sys.stderr, flush=True)
