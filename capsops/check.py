"""`python -m capsops check`: proves the kernels on this machine, and times them.

Every op is compared with the reference in float64, value and gradients, with every option, in each dtype, and
called twice for the same bits; each backend in a process of its own, which a fault of a kernel may end. What
was right is recorded in the user's cache folder, and impl="auto" takes it from then on. Times by shape class
follow; what --json prints is a record that CAPSOPS_RECORD may name (capsops/proofs/order.py).
"""

import argparse
import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from subprocess import SubprocessError
from typing import Any

import torch

import capsops
from capsops import dispatch
from capsops.backends import BACKENDS
from capsops.backends.backend import ALL_OPTIONS, Backend
from capsops.backends.device import Device
from capsops.command_line import device_named, table
from capsops.measuring.class_times import class_times
from capsops.measuring.trials import ReferenceFailedError, Trial, trials
from capsops.proofs import child as checking
from capsops.proofs import records
from capsops.proofs.scope import DTYPES, OPS, PLAIN, Call

# Errors that say nothing of the kernels.
_OUTSIDE_ERRORS = OSError, MemoryError, SubprocessError, torch.OutOfMemoryError, ReferenceFailedError
_OUTSIDE = (
    *("out of memory", "alloc_failed", "no space left", "busy or unavailable", "not_initialized"),
    *("initialization error", "driver version is insufficient", "no cuda-capable device"),
)


class _Lines:
    """The file of results, a line of JSON each, which the process that waits reads."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def add(self, **values: object) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def child() -> None:
    """The process that checks, as capsops/proofs/child.py starts it; its request is a line on stdin.

    What goes wrong outside the kernels ends it with a status of its own, which says nothing of them.
    """
    try:
        request = _read_request()
        _end_with_parent()
        _leave_no_core_dump()
        _answer(request)
    except Exception:
        with contextlib.suppress(OSError, ValueError):  # the disk may be full
            traceback.print_exc()  # the last line is the reason that the parent shows
            sys.stderr.flush()
        os._exit(checking.NOT_THE_KERNELS)


def _read_request() -> dict[str, Any]:
    """Without a buffer, whose lock the thread that waits for the end of stdin would hold at exit."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            raise EOFError("the process that started this one has ended")
        line += byte
    return json.loads(line)


def _answer(request: dict[str, Any]) -> None:
    lines = _Lines(request["lines"])
    device, backend = torch.device(request["device"]), BACKENDS[request["key"]["backend"]]
    here = records.key(backend, dispatch.device_facts(device))
    if here != request["key"]:
        different = [f"{name}: {here[name]}" for name in here if here[name] != request["key"].get(name)]
        lines.add(stopped=f"the process that checks sees something else: {', '.join(different)}")
        return
    done = {(op, dtype, option) for op, dtype, option in request["done"]}
    left = [x for x in trials(backend, request["thorough"]) if not done.issuperset(x.calls)]
    chosen = _share(left, *request["share"])
    # What a kernel leaves unwritten is NaN then.
    torch.use_deterministic_algorithms(True, warn_only=True)
    _check(backend, device, chosen, done, request["until"], lines)


def _check(
    backend: Backend,
    device: torch.device,
    chosen: Sequence[Trial],
    done: set[Call],
    until: float | None,
    lines: _Lines,
) -> None:
    """A line before each trial, and one for each call when all its trials are done."""
    left = Counter(call for trial in chosen for call in trial.calls)
    wrong: dict[Call, str] = {}
    compared, largest = Counter[Call](), dict.fromkeys(left, 0.0)
    for trial in chosen:
        if until is not None and time.time() > until:
            lines.add(stopped="it was not done in time")
            return
        lines.add(running=str(trial))
        failure = ""
        try:
            error = trial.compare(backend.name, str(device))
            largest |= {call: max(error, largest[call]) for call in trial.calls}
        except AssertionError as unequal:
            failure = str(unequal)
        except _OUTSIDE_ERRORS as outside:
            lines.add(stopped=f"{type(outside).__name__}: {outside} in {trial}"[:400])
            return
        except Exception as error:
            failure = f"{type(error).__name__}: {str(error).strip()[:400]} in {trial}"
            if any(words in failure.lower() for words in _OUTSIDE):
                lines.add(stopped=failure)
                return
        if failure and not _is_alive(device):
            lines.add(fault=f"{failure}, after which the device could not be used")
            return
        for call in trial.calls:
            left[call] -= 1
            compared[call] += 1
            if failure:
                wrong.setdefault(call, failure)
            if not left[call] and call not in done:
                why = wrong.get(call, "")
                lines.add(results=[[*call, why]], compared=compared[call], largest=largest[call])
    lines.add(complete=True)


def _share(chosen: Sequence[Trial], n: int, of: int) -> list[Trial]:
    """Part n of so many, which have no call in common: ops and dtypes take turns."""
    groups = dict.fromkeys((trial.op, trial.dtype) for trial in chosen)
    mine = list(groups)[n::of]
    return [trial for trial in chosen if (trial.op, trial.dtype) in mine]


def _is_alive(device: torch.device) -> bool:
    """Whether the device still computes: a wild access of a kernel ends that for the process."""
    try:
        return bool(torch.ones(1, device=device).cpu() == 1)
    except RuntimeError:
        return False


def _end_with_parent() -> None:
    """Ends this process when its parent ends: by the kernel where it can, and by the end of its stdin."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(checking.NOT_THE_KERNELS)

    threading.Thread(target=watch, daemon=True).start()


def _leave_no_core_dump() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE: programs that dumps are piped to ignore the limit
    with contextlib.suppress(ImportError):  # there is no such limit on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--device",
        type=device_named,
        metavar="DEVICE",
        help="cpu, cuda or cuda:N (default: the current GPU, else the CPU)",
    )
    names = [name for name in BACKENDS if name != "reference"]
    parser.add_argument("--backend", choices=names, help="check only this one (default: all that can run)")
    parser.add_argument("--quick", action="store_true", help="what the automatic check tries, and no times")
    parser.add_argument("--no-times", action="store_true", help="only whether the kernels are right")
    parser.add_argument("--json", action="store_true", help="print a record for CAPSOPS_RECORD instead")


def run(args: argparse.Namespace) -> int:
    """Checks and prints; 0 if all was right, 1 if something was wrong, 2 if nothing could be checked."""
    default = device_named("cuda" if torch.cuda.is_available() else "cpu")
    device = dispatch.device_facts(args.device or default)
    chosen, refused = backends_on(device, args.backend)
    for line in refused:
        print(line, file=sys.stderr)
    if not chosen:
        return 2
    checks = [checked(backend, device, thorough=not args.quick) for backend in chosen]
    right = [check for check in checks if check["complete"] and not check["wrong"]]
    times = []
    if not (args.quick or args.no_times):
        names = [check["backend"] for check in right]
        times = class_times(device, names, lambda line: print(line, file=sys.stderr, flush=True))
    result = {**_about(device), "checks": checks, "times": times}
    print(json.dumps(result, indent=1, ensure_ascii=False) if args.json else text(result))
    return 0 if len(right) == len(checks) else 1


def backends_on(device: Device, name: str | None) -> tuple[list[Backend], list[str]]:
    """Those that can run on the device, and why others cannot."""
    chosen, refused = [], []
    for backend in BACKENDS.values():
        if backend.name == "reference" or name not in (None, backend.name):
            continue
        if not backend.takes_device(device.type):
            if name is not None:
                takes = ", ".join(backend.devices)
                refused.append(f"--backend {name}: takes tensors on {takes}, and the device is {device.type}")
            continue
        interpreted = device.type == "cpu"  # Triton's interpreter, which is there to be checked
        if reason := backend.unavailable or ("" if interpreted else backend.why_not_on(device)):
            refused.append(f"{backend.name} is not checked: {reason}")
        else:
            chosen.append(backend)
    return chosen, refused


def checked(backend: Backend, device: Device, thorough: bool) -> dict[str, Any]:
    """The check of a backend as the JSON has it; the record goes into the user's cache folder."""
    title = f"the {backend.name} kernels on {device.model}"
    print(f"checking {title} …", file=sys.stderr, flush=True)
    request = checking.Request(records.key(backend, device), checking.name_there(device), None, [], thorough)
    begin, said = time.monotonic(), 0.0

    def progress(lines: list[dict[str, Any]]) -> None:
        nonlocal said
        if time.monotonic() - said > 10:
            said = time.monotonic()
            print(f"  {said - begin:.0f} s: {_running(lines)}", file=sys.stderr, flush=True)

    outcome = checking.run(request, device, progress=progress, jobs=checking.jobs(backend, device, thorough))
    record, before = outcome.record, records.read(request.key)
    concludes = record.complete or record.fault or record.wrong()
    note = "none"
    if not concludes and before is not None and (before.complete or before.fault):
        note = "an earlier one, which came further, stays"
    elif record.results or record.fault:
        try:
            note = str(records.write(record))
        except OSError as error:
            note = f"not written: {error}"
    calls = [line for line in outcome.lines if "results" in line]
    return {
        "backend": backend.name,
        "kernels": record.key["kernels"],
        "complete": record.complete and not record.fault,
        "unfinished": outcome.unfinished,
        "wrong": record.wrong(),
        "seconds": round(time.monotonic() - begin, 1),
        "record": note,
        "calls": [
            dict(zip(("op", "dtype", "option", "wrong"), line["results"][0], strict=True))
            | {"compared": line["compared"], "largest_error": line["largest"]}
            for line in calls
        ],
    }


def _running(lines: list[dict[str, Any]]) -> str:
    running = [line["running"] for line in lines if "running" in line]
    return f"{len(running)} comparisons, at {running[-1]}" if running else "starting"


def _about(device: Device) -> dict[str, Any]:
    return {
        "capsops": capsops.__version__,
        "torch": str(torch.__version__),
        "triton": records.version("triton"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device._asdict(),
    }


def text(result: dict[str, Any]) -> str:
    """The result as a table to read, and to paste into an issue."""
    device = result["device"]
    driver = f", driver {device['driver']}" if device["driver"] else ""
    lines = [
        f"capsops {result['capsops']}, torch {result['torch']}, Triton {result['triton']}, {result['date']}",
        f"{device['model']}{driver}",
    ]
    for check in result["checks"]:
        lines += ["", summary(check)]
    if result["times"]:
        lines += [
            "",
            "times in µs, forward / forward and backward; the order by these is for CAPSOPS_RECORD",
            "",
        ]
        lines.append(_times(result["times"]))
    return "\n".join(lines)


def summary(check: dict[str, Any]) -> str:
    """What came of one backend's check."""
    count = sum(call["compared"] for call in check["calls"])
    title = f"{check['backend']}, kernels {check['kernels']}"
    lines = [f"{title}: {count} comparisons in {check['seconds']:.0f} s", _calls(check["calls"])]
    lines += [f"  WRONG: {wrong}" for wrong in check["wrong"]]
    if check["unfinished"]:
        lines.append(f"  not finished: {check['unfinished']}")
    return "\n".join([*lines, f"  record: {check['record']}"])


def _calls(calls: list[dict[str, Any]]) -> str:
    """A row for each op and dtype, a column for each option."""
    by_call = {(call["op"], call["dtype"], call["option"]): call for call in calls}
    tried = {call["option"] for call in calls}
    options = [PLAIN, *(option for option in sorted(ALL_OPTIONS) if option in tried)]
    rows = [("op", "dtype", "plain", *options[1:], "largest error")]
    for op in OPS:
        for dtype in DTYPES:
            of_row = [by_call.get((op, dtype, option)) for option in options]
            cells = ["–" if call is None else "WRONG" if call["wrong"] else "right" for call in of_row]
            errors = [call["largest_error"] for call in of_row if call is not None]
            if errors:
                rows.append((op, dtype, *cells, f"{max(errors):.1e}"))
    return table(rows)


def _times(times: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in times for name in row["seconds"]))
    rows = [("op", "dtype", "class", "case", *names, "order")]
    for row in times:
        cells = [
            " / ".join(f"{seconds * 1e6:.0f}" for seconds in row["seconds"].get(name, ())) or "–"
            for name in names
        ]
        rows.append((row["op"], row["dtype"], row["class"], row["case"], *cells, ", ".join(row["order"])))
    return table(rows)
