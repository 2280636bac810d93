"""Several runs of one system, which differ in their seed, and what they come to."""

import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout

from infocapsgan.engine.interruption import Interruption
from infocapsgan.engine.run_directory import EVALUATION, SUMMARY, RunError, lock_run, write_json
from infocapsgan.engine.settings import Settings
from infocapsgan.metrics import best
from infocapsgan.systems import SYSTEMS


class Sweep(NamedTuple):
    """What a command asks for."""

    name: str  # of the system
    settings: Settings  # of its runs, except for seed and folder
    options: tuple[str, ...]  # the words that give those settings to train
    seeds: tuple[int, ...]  # one run each
    path: Path  # the folder of the sweep
    jobs: int  # how many runs at a time
    failed_below: float | None  # the headline metric that a run must reach; None: see infocapsgan.sweep
    evaluated: bool  # whether infocapsgan.evaluate measures each run at its end

    @property
    def headline(self) -> str:
        """The metric that decides whether a run has failed."""
        return SYSTEMS[self.name].headline

    @property
    def results(self) -> list[str]:
        """The files that a finished run has, in the order in which they are written."""
        return [SUMMARY, EVALUATION] if self.evaluated else [SUMMARY]

    def run(self, seed: int) -> Path:
        """The run directory of a seed."""
        return self.path / f"seed-{seed}"

    def missing(self, seed: int) -> Path | None:
        """The file that the next process of a seed has to write; None where the seed is finished."""
        return next((path for name in self.results if not (path := self.run(seed) / name).exists()), None)

    def read(self, seed: int, name: str) -> dict[str, Any]:
        """One of the results of a seed."""
        return json.loads((self.run(seed) / name).read_text())


def run_all(sweep: Sweep) -> dict[int, str]:
    """Runs the processes of all seeds that are not finished, `jobs` at a time, and waits for them.

    A signal is passed on to the runs, which save their state, and is a KeyboardInterrupt at the end; a second
    one kills them. Returns the last line that each crashed run printed, by its seed.
    """
    with Interruption(2) as signals, ThreadPoolExecutor(sweep.jobs) as pool:
        lines = list(pool.map(lambda seed: _finish(sweep, seed, signals), sweep.seeds))
    if signals.came:
        raise KeyboardInterrupt
    return {seed: line for seed, line in zip(sweep.seeds, lines, strict=True) if line}


def _finish(sweep: Sweep, seed: int, signals: Interruption) -> str:
    """Runs one process after the other until a seed is finished; gives the last line of one that crashed."""
    while (wanted := sweep.missing(seed)) and not signals.came:
        if _in_use(run := sweep.run(seed)):  # a killed sweep left it behind; it counts as one of the jobs
            print(f"seed {seed}: another process trains {run}; waiting for it", flush=True)
            while _in_use(run) and not signals.came:
                time.sleep(0.1)
            continue
        process, passed_on = _start(sweep, seed), 0
        while process.poll() is None:
            if signals.came > passed_on:
                passed_on = signals.came
                process.send_signal(signal.SIGTERM if passed_on == 1 else signal.SIGKILL)
            time.sleep(0.1)
        if not (wanted.exists() or signals.came or _in_use(run)):
            lines = run.with_suffix(".log").read_text(errors="replace").strip().splitlines()
            last = lines[-1] if lines else "nothing was printed"
            print(f"seed {seed}: crashed: {last}", flush=True)
            return last
    if not wanted:
        summary = sweep.read(seed, SUMMARY)
        value, seconds = summary["metrics"][sweep.headline], summary["seconds"]
        print(f"seed {seed}: is finished: {sweep.headline} {value:.4f} in {seconds:.0f} s", flush=True)
    return ""


def _in_use(run: Path) -> bool:
    try:
        if run.is_dir():
            lock_run(run).release()
    except RunError:
        return True
    return False


def summarise(sweep: Sweep, crashed: dict[int, str]) -> dict[str, Any]:
    """What the runs of a finished sweep came to, with the keys of results/*.json."""
    if not (seeds := [seed for seed in sweep.seeds if seed not in crashed]):
        raise RunError(f"every run crashed; what they printed is in {sweep.path}/seed-*.log")
    summaries = [sweep.read(seed, SUMMARY) for seed in seeds]
    values, first, below = _metrics(sweep, seeds), summaries[0], sweep.failed_below
    if below is None and sweep.headline == "unsupervised_accuracy":
        below = max(first["baselines"][sweep.headline].values())
    failed = [seeds[i] for i, x in enumerate(values[sweep.headline]) if below is not None and x < below]
    share = (len(failed) + len(crashed)) / len(sweep.seeds)
    lines = {str(seed): line for seed, line in crashed.items()}
    ended = max((sweep.run(seed) / SUMMARY).stat().st_mtime for seed in seeds)
    return {
        "system": sweep.name,
        "dataset": sweep.settings.dataset,
        "recipe": sweep.settings.recipe,
        "seeds": seeds,
        "metrics": {name: _spread(name, of_metric) for name, of_metric in values.items()},
        "baselines": first["baselines"],
        "failed": {"share": share, "below": below, "seeds": failed, "crashed": lines},
        "seconds": [summary["seconds"] for summary in summaries],
        "device": _joined(summary["device"] for summary in summaries),
        "versions": {name: _joined(s["versions"][name] for s in summaries) for name in first["versions"]},
        "date": date.fromtimestamp(ended).isoformat(),
        "settings": _shared(first["settings"]),
    }


def table(sweep: Sweep, result: dict[str, Any]) -> str:
    """A Markdown table of one row: the headline metric in per cent, failures, seconds of a run."""
    headline, failed = result["metrics"][sweep.headline], result["failed"]
    mean, std, most = (100 * (headline[key] or 0) for key in ("mean", "std", "best"))
    threshold = f" (below {100 * failed['below']:.1f} % or crashed)" if failed["below"] is not None else ""
    cells = {
        "system": result["system"],
        "data": result["dataset"],
        "recipe": result["recipe"],
        "seeds": f"{len(sweep.seeds)}",
        f"{sweep.headline.replace('_', ' ')}, %": f"{mean:.2f} ± {std:.2f}",
        "best, %": f"{most:.2f}" if headline["best"] is not None else "–",
        f"failed{threshold}": f"{round(failed['share'] * len(sweep.seeds))} of {len(sweep.seeds)}",
        "seconds a run": f"{statistics.fmean(result['seconds']):.0f}",
    }
    rows = (cells.keys(), ("---",) * len(cells), cells.values())
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


@contextmanager
def claimed(sweep: Sweep) -> Iterator[str | None]:
    """Makes the folder and keeps other sweeps out of it; yields the commits of all its starts so far."""
    sweep.path.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(sweep.path / "sweep.lock", timeout=0):
            yield _remember(sweep)
    except Timeout as error:
        raise RunError(f"--out: another sweep is still at work in {sweep.path}") from error


def _remember(sweep: Sweep) -> str | None:
    file, commit = sweep.path / "sweep.json", _commit()
    new: dict[str, Any] = {"system": sweep.name, "settings": _shared(sweep.settings.to_json()), "commits": []}
    if not file.exists() and any(path.name != "sweep.lock" for path in sweep.path.iterdir()):
        raise RunError(f"--out: {sweep.path} is not empty and holds no sweep")
    known = json.loads(file.read_text()) if file.exists() else new
    before, now = (values["settings"] | {"system": values["system"]} for values in (known, new))
    if other := _differences(before, now):
        raise RunError(f"--out: {sweep.path} holds a sweep with other settings: {other}")
    if commit and commit not in known["commits"]:
        known["commits"].append(commit)
    write_json(file, known)
    return _joined(known["commits"]) or None


def digest(settings: Settings) -> str:
    """Tells sweeps with other settings apart, so that the same command finds its folder again."""
    return hashlib.sha256(json.dumps(_shared(settings.to_json()), sort_keys=True).encode()).hexdigest()[:8]


def _metrics(sweep: Sweep, seeds: list[int]) -> dict[str, list[float]]:
    """Each metric's value in each run; RunError where one has other settings, or lacks a metric."""
    shared, metrics = _shared(sweep.settings.to_json()), []
    for seed in seeds:
        if other := _differences(_shared(sweep.read(seed, SUMMARY)["settings"]), shared):
            anew = f"delete {sweep.run(seed)}, and the same command trains it anew"
            raise RunError(f"seed {seed} was trained on with other settings: {other}; {anew}")
        metrics.append({k: v for name in sweep.results for k, v in sweep.read(seed, name)["metrics"].items()})
    names = dict.fromkeys(name for of_run in metrics for name in of_run)
    for seed, of_run in zip(seeds, metrics, strict=True):
        if lacking := [name for name in names if name not in of_run]:
            again = f"delete {' and '.join(sweep.results)} in {sweep.run(seed)} to have it measured again"
            raise RunError(f"seed {seed} has no {', '.join(lacking)}, which other seeds have; {again}")
    return {name: [of_run[name] for of_run in metrics] for name in names}


def _start(sweep: Sweep, seed: int) -> subprocess.Popen:
    run, log = sweep.run(seed), sweep.run(seed).with_suffix(".log")
    if (run / SUMMARY).exists():
        words = ["infocapsgan.evaluate", str(run), "--device", sweep.settings.device]
    elif (run / "config.json").exists():
        words = ["infocapsgan.train", "--resume", str(run)]
    else:
        # A run that was killed before it wrote its config left nothing to go on from.
        shutil.rmtree(run, ignore_errors=True)
        words = ["infocapsgan.train", sweep.name, *sweep.options, "--seed", str(seed), "--out", str(run)]
    threads = str(max(1, torch.get_num_threads() // sweep.jobs))
    env = ({"OMP_NUM_THREADS": threads} if sweep.jobs > 1 else {}) | os.environ
    print(f"seed {seed}: {words[0]}, output in {log}", flush=True)
    with log.open("a") as output:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        # In a session of its own, a run gets no Ctrl-C of the terminal beside the signal that is passed on.
        return subprocess.Popen([sys.executable, "-m", *words], env=env, start_new_session=True, **streams)


def _shared(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that the runs of a sweep have in common."""
    return {name: value for name, value in settings.items() if name not in ("seed", "out")}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What `old` has that `new` has not, in words; empty where they are the same."""
    return ", ".join(f"{key} {old.get(key)}" for key in sorted(old | new) if old.get(key) != new.get(key))


def _commit() -> str | None:
    here = Path(__file__)
    command = f"git ls-files --error-unmatch {here.name} && git describe --always --dirty --exclude='*'"
    done = subprocess.run(command, shell=True, cwd=here.parent, capture_output=True, text=True)
    return done.stdout.split()[-1] if done.returncode == 0 else None


def _spread(name: str, values: list[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (0 of one value), best (None where there is no better) and values."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "best": best(name, values), "values": values}


def _joined(words: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(words))
