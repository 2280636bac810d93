"""results.jsonl: a line as soon as something is known, so that a run cut short leaves what it knows."""

import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

failures: list[str] = []  # of this process's lines


def folder() -> Path:
    """$OUT, by default build/gpu."""
    return Path(os.environ.get("OUT") or "build/gpu")


def record(part: str, **values: object) -> None:
    """Adds a line, and prints its beginning. Several processes may write at the same time.

    A line with `failed` has an error message, and makes the process's part fail.
    """
    if "failed" in values:
        failures.append(str(values["failed"]))
    line = json.dumps({"part": part, "time": round(time.time(), 2), **values}, default=str) + "\n"
    folder().mkdir(parents=True, exist_ok=True)
    with (folder() / "results.jsonl").open("a") as file:
        file.write(line)  # one write of a whole line: lines of several processes do not mix
    print(line[:300].rstrip(), flush=True)


@contextmanager
def failure_recorded(part: str, **labels: object) -> Iterator[None]:
    """An exception inside becomes a line with `failed`, and what follows goes on."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        record(part, **labels, failed=f"{type(error).__name__}: {str(error)[:400]}")


def recorded(*parts: str) -> list[dict]:
    """The lines of these parts so far, by default of all."""
    path = folder() / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if not parts or row["part"] in parts]
