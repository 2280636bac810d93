"""What checks left in the user's cache folder: a file for each backend and kind of device.

    $XDG_CACHE_HOME/capsops, or ~/.cache/capsops

A file for other kernels, or another driver, torch or Triton, has another name and is no proof. A file that
cannot be read is as good as none, and the next check replaces it.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from capsops.backends.backend import Backend
from capsops.backends.device import Device
from capsops.proofs.scope import Call, Scope

FORMAT = 1


def folder() -> Path:
    """The user's cache folder for capsops.

    Raises:
        OSError: the user has no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "capsops"
    except RuntimeError as error:
        raise OSError(str(error)) from error


def version(package: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def key(backend: Backend, device: Device) -> dict[str, str]:
    """What a record is about: with another value of any of these it proves nothing."""
    return {
        "backend": backend.name,
        "kernels": f"{backend.kernels(device)} {backend.code()}",
        "device": device.model,
        "driver": device.driver,
        "torch": str(torch.__version__),
        "triton": version("triton"),
    }


@dataclass
class Record:
    """What a check of one backend's kernels on one kind of device came to.

    Attributes:
        key: what it is about.
        results: "" for each call that was right, else what was wrong.
        fault: why none of the kernels are to be trusted, such as a crash; empty where there was none.
        complete: whether every call was tried.
    """

    key: dict[str, str]
    results: dict[Call, str] = field(default_factory=dict)
    fault: str = ""
    complete: bool = False

    def scope(self) -> Scope:
        """The calls that are proved."""
        right = (call for call, wrong in self.results.items() if not wrong)
        return Scope() if self.fault else Scope(frozenset(right))

    def wrong(self) -> list[str]:
        """What was wrong, a line for each failure."""
        return list(dict.fromkeys(filter(None, [self.fault, *self.results.values()])))


def path(key: dict[str, str]) -> Path:
    """The file for a key."""
    digest = hashlib.sha256(json.dumps([FORMAT, key], sort_keys=True).encode()).hexdigest()[:12]
    model = re.sub(r"[^a-z0-9]+", "-", key["device"].lower()).strip("-")
    return folder() / f"{key['backend']}-{model}-{digest}.json"


def read(key: dict[str, str]) -> Record | None:
    """The record for a key; None where there is none that can be read."""
    try:
        values: Any = json.loads(path(key).read_text(encoding="utf-8"))
        if values["format"] != FORMAT or values["key"] != key:
            return None
        results = {(str(op), str(dtype), str(opt)): str(why) for op, dtype, opt, why in values["results"]}
        return Record(key, results, str(values["fault"]), bool(values["complete"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write(record: Record) -> Path:
    """Writes a record, whole or not at all.

    Raises:
        OSError: the cache folder cannot be written.
    """
    values = {
        "format": FORMAT,
        "key": record.key,
        "checked": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "complete": record.complete,
        "fault": record.fault,
        "results": [[*call, why] for call, why in record.results.items()],
    }
    return write_file(path(record.key), json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def write_file(target: Path, text: str) -> Path:
    """Writes by way of a temporary file beside the target."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    return target


def why_not_writable() -> str:
    """Why the cache folder cannot be written; empty where it can."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder()):
            pass
    except OSError as error:
        return f"the cache folder cannot be written ({error})"
    return ""
