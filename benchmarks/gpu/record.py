"""results.jsonl: a line as soon as something is known, so that a run cut short leaves what it knows."""

import json
import os
import time
from pathlib import Path


def folder() -> Path:
    """$OUT, by default build/gpu."""
    return Path(os.environ.get("OUT") or "build/gpu")


_failures: list[str] = []


def failures() -> list[str]:
    """What the lines of this process with `failed` say."""
    return _failures


def record(part: str, **values: object) -> None:
    """Adds a line, and prints its beginning. Several processes may write at the same time.

    A line with `failed` says what went wrong, and the process's part ends with a failure.
    """
    if values.get("failed"):
        _failures.append(str(values["failed"]))
    line = json.dumps({"part": part, "time": round(time.time(), 2), **values}, default=str) + "\n"
    folder().mkdir(parents=True, exist_ok=True)
    with (folder() / "results.jsonl").open("a") as file:
        file.write(line)  # one write of a whole line: lines of several processes do not mix
    print(line[:300].rstrip(), flush=True)


def recorded(*parts: str) -> list[dict]:
    """The lines of these parts so far."""
    path = folder() / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if row["part"] in parts]
