"""Trains a system with several seeds: `python -m infocapsgan.sweep SYSTEM --seeds 0..9 [options of train]`.

Each seed is a process of its own and a run directory in the folder of the sweep. The same command goes on
where it was interrupted: finished seeds are kept, the others resumed. At the end result.json holds, for each
metric, the mean, sample standard deviation, best and values over all runs that came to their end, and
result.md the row of a table.

A run has failed when it crashed, or when its headline metric is below --failed-below. For systems with a
class code that is by default what k-means reaches on the pixels of the same data, for the others nothing. A
crashed run has no values; one that failed otherwise counts in every mean.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from infocapsgan.engine import command_line
from infocapsgan.engine.atomic import atomic_file
from infocapsgan.engine.run_directory import EVALUATION, SUMMARY, write_json
from infocapsgan.engine.settings import Settings
from infocapsgan.metrics.clustering import best
from infocapsgan.systems import SYSTEMS

PROGRAM = "python -m infocapsgan.sweep"
SET_FOR_EACH_RUN = ("--seed", "--resume")


class SweepError(RuntimeError):
    """A sweep cannot start in its folder, or its runs did not leave what a summary is made of."""


@dataclass(frozen=True)
class Sweep:
    """What a command asks for.

    Attributes:
        name: of the system.
        settings: of its runs, but for seed and folder.
        options: the words that give those settings to train.
        seeds: one run each.
        path: the folder of the sweep.
        jobs: how many runs at a time.
        failed_below: the headline metric that a run must reach; None takes the default, see the module.
        evaluated: whether infocapsgan.evaluate measures each run at its end.
    """

    name: str
    settings: Settings
    options: tuple[str, ...]
    seeds: tuple[int, ...]
    path: Path
    jobs: int
    failed_below: float | None
    evaluated: bool

    @property
    def headline(self) -> str:
        """The metric that decides whether a run has failed."""
        return SYSTEMS[self.name].headline

    def run(self, seed: int) -> Path:
        """The run directory of a seed."""
        return self.path / f"seed-{seed}"

    def log(self, seed: int) -> Path:
        """What the processes of a seed print."""
        return self.path / f"seed-{seed}.log"

    def missing(self, seed: int) -> Path | None:
        """The file that the next process of a seed has to write; None where the seed is finished."""
        wanted = [SUMMARY, *([EVALUATION] if self.evaluated else [])]
        return next((self.run(seed) / name for name in wanted if not (self.run(seed) / name).exists()), None)


@dataclass
class Outcome:
    """How a sweep ended.

    Attributes:
        crashed: the last line that each crashed run printed, by its seed.
        interrupted: whether a signal ended it.
    """

    crashed: dict[int, str] = field(default_factory=dict)
    interrupted: bool = False


def main() -> None:
    """The command line."""
    words = sys.argv[1:]
    sweep = parse(words)
    try:
        with alone(sweep.path):
            commits = remember(sweep)
            outcome = run_all(sweep)
            if outcome.interrupted:
                print("interrupted; the same command goes on from here", file=sys.stderr)
                sys.exit(130)
            command = shlex.join([*PROGRAM.split(), *words])
            result = summarise(sweep, outcome.crashed) | {"command": command, "commit": commits}
            write_json(sweep.path / "result.json", result)
            with atomic_file(sweep.path / "result.md") as temporary:
                temporary.write_text(table(sweep, result))
    except SweepError as error:
        sys.exit(f"error: {error}")
    print(table(sweep, result), end="")
    print(f"written to {sweep.path / 'result.json'} and {sweep.path / 'result.md'}")


def parse(words: Sequence[str]) -> Sweep:
    """The words of a command → what it asks for; ends the program with a message where one is wrong."""
    parser = _parser()
    named = bool(words) and not words[0].startswith("-")
    given, options = parser.parse_known_args(list(words[named:]))
    if not named or words[0] not in SYSTEMS:
        parser.error(f"SYSTEM: got {words[0] if named else 'none'}, takes one of {', '.join(SYSTEMS)}")
    for option in (word.split("=")[0] for word in options):
        if option in SET_FOR_EACH_RUN:
            parser.error(f"{option}: cannot be given to a sweep, which sets it for each run")
    name = words[0]
    _, settings = command_line.parse([name, *options])
    return Sweep(
        name=name,
        settings=settings,
        options=tuple(options),
        seeds=given.seeds,
        path=given.out or Path("runs", f"sweep-{name}-{settings.dataset}-{_digest(settings)}"),
        jobs=given.jobs,
        failed_below=given.failed_below,
        evaluated=given.evaluate,
    )


def run_all(sweep: Sweep) -> Outcome:
    """Starts the processes of all seeds that are not finished, `jobs` at a time, and waits for them.

    SIGINT, SIGTERM and SIGHUP are handed on to the runs, which save their state; a second one kills them.
    """
    outcome, signals = Outcome(), _Signals()
    waiting = [seed for seed in sweep.seeds if sweep.missing(seed)]
    for seed in sweep.seeds:
        if seed not in waiting:
            print(f"seed {seed}: is finished", flush=True)
    running: dict[int, tuple[subprocess.Popen, Path]] = {}
    handed_on = 0
    with signals:
        while running or (waiting and not signals.count):
            while waiting and len(running) < sweep.jobs and not signals.count:
                seed = waiting.pop(0)
                running[seed] = _start(sweep, seed), sweep.missing(seed)
            if signals.count > handed_on:
                handed_on = signals.count
                for process, _ in running.values():
                    process.send_signal(signal.SIGTERM if handed_on == 1 else signal.SIGKILL)
            for seed, (process, wanted) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[seed]
                if wanted.exists() and sweep.missing(seed):
                    waiting.insert(0, seed)
                elif wanted.exists():
                    _report(sweep, seed)
                elif not signals.count:
                    outcome.crashed[seed] = _last_line(sweep.log(seed))
                    print(f"seed {seed}: crashed: {outcome.crashed[seed]}", flush=True)
            time.sleep(0.1)
    outcome.interrupted = bool(signals.count)
    return outcome


def summarise(sweep: Sweep, crashed: dict[int, str]) -> dict[str, Any]:
    """What the runs of a finished sweep came to, with the keys of results/*.json.

    Raises:
        SweepError: no run came to an end, or one has other settings than the sweep, or lacks a metric that
            others have.
    """
    seeds = [seed for seed in sweep.seeds if seed not in crashed]
    if not seeds:
        raise SweepError(f"every run crashed; what they printed is in {sweep.path}/seed-*.log")
    summaries = [json.loads((sweep.run(seed) / SUMMARY).read_text()) for seed in seeds]
    shared = _shared(sweep.settings)
    for seed, summary in zip(seeds, summaries, strict=True):
        values = summary["settings"]
        if other := [f"{name} {values.get(name)}" for name in shared if values.get(name) != shared[name]]:
            raise SweepError(
                f"seed {seed} was trained on with other settings: {', '.join(other)}; "
                f"delete {sweep.run(seed)}, and the same command trains it anew"
            )
    found = [summary["metrics"] for summary in summaries]
    if sweep.evaluated:
        measured = [json.loads((sweep.run(seed) / EVALUATION).read_text()) for seed in seeds]
        found = [a | b["metrics"] for a, b in zip(found, measured, strict=True)]
    names = dict.fromkeys(name for metrics in found for name in metrics)
    for seed, metrics in zip(seeds, found, strict=True):
        if lacking := [name for name in names if name not in metrics]:
            written = f"{SUMMARY} and {EVALUATION}" if sweep.evaluated else SUMMARY
            raise SweepError(
                f"seed {seed} has no {', '.join(lacking)}, which other seeds have; delete {written} "
                f"in {sweep.run(seed)}, and the same command measures it again"
            )
    baselines = summaries[0]["baselines"]
    below = sweep.failed_below
    if below is None and sweep.headline == "unsupervised_accuracy":
        below = max(baselines[sweep.headline].values())
    failed = [
        seed
        for seed, metrics in zip(seeds, found, strict=True)
        if below is not None and metrics[sweep.headline] < below
    ]
    settings = summaries[0]["settings"]
    return {
        "system": sweep.name,
        "dataset": settings["dataset"],
        "recipe": settings["recipe"],
        "seeds": seeds,
        "metrics": {name: spread(name, [metrics[name] for metrics in found]) for name in names},
        "baselines": baselines,
        "failed": {
            "share": (len(failed) + len(crashed)) / len(sweep.seeds),
            "below": below,
            "seeds": failed,
            "crashed": {str(seed): line for seed, line in crashed.items()},
        },
        "seconds": [summary["seconds"] for summary in summaries],
        "device": _joined(summary["device"] for summary in summaries),
        "versions": {
            name: _joined(summary["versions"][name] for summary in summaries)
            for name in summaries[0]["versions"]
        },
        "date": max(
            date.fromtimestamp((sweep.run(seed) / SUMMARY).stat().st_mtime) for seed in seeds
        ).isoformat(),
        "settings": {name: value for name, value in settings.items() if name not in ("seed", "out")},
    }


def spread(name: str, values: list[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (0 of one value), best (None where there is no better) and values."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "best": best(name, values),
        "values": values,
    }


def table(sweep: Sweep, result: dict[str, Any]) -> str:
    """A Markdown table of one row: the headline metric in per cent, failures, seconds of a run."""
    found, failed = result["metrics"][sweep.headline], result["failed"]
    reached = f"{100 * found['best']:.2f}" if found["best"] is not None else "–"
    count = round(failed["share"] * len(sweep.seeds))
    threshold = f" (below {100 * failed['below']:.1f} % or crashed)" if failed["below"] is not None else ""
    cells = {
        "system": result["system"],
        "data": result["dataset"],
        "recipe": result["recipe"],
        "seeds": f"{len(sweep.seeds)}",
        f"{sweep.headline.replace('_', ' ')}, %": f"{100 * found['mean']:.2f} ± {100 * found['std']:.2f}",
        "best, %": reached,
        f"failed{threshold}": f"{count} of {len(sweep.seeds)}",
        "seconds a run": f"{statistics.fmean(result['seconds']):.0f}",
    }
    rows = (cells.keys(), ("---",) * len(cells), cells.values())
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Makes the folder and holds it against other sweeps.

    The lock is inherited by the runs: it is free once this process and all of them have ended.

    Raises:
        SweepError: another sweep, or a run that one left behind, is at work there.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / "sweep.lock").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SweepError(f"--out: another sweep, or a run of one, is still at work in {path}") from error
        yield


def remember(sweep: Sweep) -> str | None:
    """Writes what the sweep is to its folder, and returns the commits of all its starts so far.

    Raises:
        SweepError: the folder holds something else, or a sweep with other settings.
    """
    file, commit = sweep.path / "sweep.json", _commit()
    known = {"system": sweep.name, "settings": _shared(sweep.settings), "commits": []}
    if file.exists():
        before = json.loads(file.read_text())
        old, new = ({"system": sweep_["system"]} | sweep_["settings"] for sweep_ in (before, known))
        other = [f"{name} {old.get(name)}" for name in sorted(old | new) if old.get(name) != new.get(name)]
        if other:
            raise SweepError(f"--out: {sweep.path} holds a sweep with other settings: {', '.join(other)}")
        known = before
    elif any(path.name != "sweep.lock" for path in sweep.path.iterdir()):
        raise SweepError(f"--out: {sweep.path} is not empty and holds no sweep")
    if commit and commit not in known["commits"]:
        known["commits"].append(commit)
    write_json(file, known)
    return " / ".join(known["commits"]) or None


def _start(sweep: Sweep, seed: int) -> subprocess.Popen:
    run = sweep.run(seed)
    if (run / SUMMARY).exists():
        words = ["infocapsgan.evaluate", str(run), "--device", sweep.settings.device]
    elif (run / "config.json").exists():
        words = ["infocapsgan.train", "--resume", str(run)]
    else:
        # A run that was killed before it wrote its config left nothing to go on from.
        shutil.rmtree(run, ignore_errors=True)
        words = ["infocapsgan.train", sweep.name, *sweep.options, "--seed", str(seed), "--out", str(run)]
    environment = dict(os.environ)
    if sweep.jobs > 1:
        threads = max(1, torch.get_num_threads() // sweep.jobs)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    print(f"seed {seed}: {words[0]}, output in {sweep.log(seed)}", flush=True)
    with sweep.log(seed).open("a") as log:
        # In a session of its own, a run gets no Ctrl-C of the terminal beside the signal that is handed on.
        return subprocess.Popen(
            [sys.executable, "-m", *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            close_fds=False,
        )


def _report(sweep: Sweep, seed: int) -> None:
    summary = json.loads((sweep.run(seed) / SUMMARY).read_text())
    value = summary["metrics"][sweep.headline]
    print(f"seed {seed}: {sweep.headline} {value:.4f} in {summary['seconds']:.0f} s", flush=True)


class _Signals:
    """Counts SIGINT, SIGTERM and SIGHUP while its block lasts."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "_Signals":
        self._before = {
            number: signal.signal(number, self._note)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.count += 1


def _shared(settings: Settings) -> dict[str, Any]:
    """The settings that the runs of a sweep have in common."""
    return {name: value for name, value in settings.to_json().items() if name not in ("seed", "out")}


def _digest(settings: Settings) -> str:
    """Tells sweeps with other settings apart, so that the same command finds its folder again."""
    return hashlib.sha256(json.dumps(_shared(settings), sort_keys=True).encode()).hexdigest()[:8]


def _commit() -> str | None:
    """Of the checkout that this file is part of; None where it is part of none."""
    here = Path(__file__)

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _last_line(log: Path) -> str:
    lines = re.split(r"[\r\n]+", log.read_text(errors="replace").strip())
    return lines[-1]


def _joined(values: Iterator[str]) -> str:
    return " / ".join(dict.fromkeys(values))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} SYSTEM --seeds SEEDS [options] [options of infocapsgan.train]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=_seeds, required=True, help="0..9, or 0,3,5")
    parser.add_argument("--jobs", type=_count, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the sweep (default: one under runs/ by its settings)",
    )
    parser.add_argument(
        "--failed-below",
        type=_share,
        metavar="SHARE",
        help="a run whose headline metric is below this has failed (default: see above)",
    )
    parser.add_argument(
        "--evaluate", action="store_true", help="measure each run by infocapsgan.evaluate, too"
    )
    return parser


def _seeds(word: str) -> tuple[int, ...]:
    if found := re.fullmatch(r"(\d+)\.\.(\d+)", word):
        seeds = tuple(range(int(found[1]), int(found[2]) + 1))
    else:
        seeds = tuple(int(part) for part in word.split(",")) if re.fullmatch(r"\d+(,\d+)*", word) else ()
    if not seeds or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"got {word}, takes first..last, or numbers with commas between")
    return seeds


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"got {word}, takes a whole number of at least 1")
    return int(word)


def _share(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"got {word}, takes a number from 0 to 1")
    return value


if __name__ == "__main__":
    main()
