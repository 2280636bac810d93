import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from infocapsgan import data, sweep
from infocapsgan.engine import sweep as engine
from infocapsgan.engine.checkpoint import checkpoints
from infocapsgan.engine.run_directory import lock_run, read_metrics
from infocapsgan.metrics import best
from infocapsgan.systems import CapsNet
from tests.processes import ROOT, Process, start_python

TINY = ["--width", "8", "--batch-size", "8", "--max-steps", "4"]


def start(*words):
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return start_python("-m", "infocapsgan.sweep", *words, **environment)


@pytest.fixture
def forked(monkeypatch):
    """Forks off the runs of a sweep in this process; one in a process of its own starts them as ever."""

    def start(command, *, env, stdout, **_):
        assert command[:2] == [sys.executable, "-m"]
        return Process(command[1:], env, log=stdout)

    if sys.platform == "linux":
        monkeypatch.setattr(engine, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": start}))


def fails(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        sweep.parse(words)
    assert caught.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def write_run(found, seed, value, *, baseline=0.8, seconds=10.0, exist_ok=False):
    path = found.run(seed)
    path.mkdir(parents=True, exist_ok=exist_ok)
    summary = {
        "metrics": {"unsupervised_accuracy": value, "share_of_cluster_0": 0.1},
        "baselines": {"unsupervised_accuracy": {"k-means on pixels": baseline}},
        "seconds": seconds,
        "device": "abacus",
        "versions": {"torch": "2"},
        "settings": found.settings.to_json() | {"seed": seed, "out": str(path)},
    }
    (path / "summary.json").write_text(json.dumps(summary))


def test_the_words_of_a_command(tmp_path):
    found = sweep.parse(["capsnet", "--seeds", "2..4", "--epochs", "3", "--leaky", "--out", str(tmp_path)])
    assert found.seeds == (2, 3, 4)
    assert found.options == ("--epochs", "3", "--leaky")
    assert (found.settings.epochs, found.settings.leaky) == (3, True)
    assert found.path == tmp_path
    assert sweep.parse(["capsnet", "--seeds=7,1"]).seeds == (7, 1)


def test_the_folder_follows_from_the_settings():
    command = ["capsnet", "--seeds", "0..2"]
    first = sweep.parse(command).path
    assert first.parent == Path("runs")
    assert sweep.parse(["capsnet", "--jobs", "2", "--seeds", "0..9"]).path == first
    assert sweep.parse([*command, "--epochs", "3"]).path != first


def test_nothing_starts_before_all_options_are_right(capsys, monkeypatch):
    monkeypatch.setattr(data, "load", None)
    for words, message in (
        ((), "the following arguments are required: --seeds"),
        (("--seeds", "0..1"), "SYSTEM: got none, takes one of capsnet, dcgan"),
        (("resnet", "--seeds", "0..1"), "SYSTEM: got resnet, takes one of"),
        (("capsnet", "--seeds", "3..1"), "--seeds: got 3..1, takes first..last"),
        (("capsnet", "--seeds", "1,1"), "--seeds: got 1,1, takes"),
        (("capsnet", "--seeds", "x"), "--seeds: got x, takes"),
        (("capsnet", "--seeds", "1", "--jobs", "0"), "--jobs: got 0, takes a whole number of at least 1"),
        (("capsnet", "--seeds", "1", "--jobs", "x"), "--jobs: invalid int value: 'x'"),
        (("capsnet", "--seeds", "1", "--failed-below", "95"), "--failed-below: got 95, takes a number from"),
        (("capsnet", "--seeds", "1", "--seed", "3"), "--seed: cannot be given to a sweep"),
        (("capsnet", "--seeds", "1", "--resume=x"), "--resume: cannot be given to a sweep"),
        (("capsnet", "--seeds", "1", "--epochs", "0"), "--epochs: got 0, takes at least 1"),
        (("capsnet", "--seeds", "1", "--bach-size", "3"), "Unrecognized options: --bach-size"),
    ):
        assert message in fails(capsys, *words), words


def test_figures_by_hand(tmp_path):
    found = sweep.parse(["infocapsgan", "--seeds", "0..3", "--out", str(tmp_path)])
    for seed, value in ((0, 0.9), (1, 0.7), (2, 0.95)):
        write_run(found, seed, value)
    result = sweep.summarise(found, {3: "stopped: the loss is nan"})
    accuracy = result["metrics"]["unsupervised_accuracy"]
    assert accuracy["mean"] == pytest.approx(0.85)
    assert accuracy["std"] == pytest.approx((0.05**2 + 0.15**2 + 0.1**2) ** 0.5 / 2**0.5)
    assert accuracy["best"] == 0.95
    assert accuracy["values"] == [0.9, 0.7, 0.95]
    assert result["metrics"]["share_of_cluster_0"]["best"] is None
    assert result["seeds"] == [0, 1, 2]
    assert result["seconds"] == [10, 10, 10]
    left_out = {"seed": 0, "out": str(tmp_path)}
    assert result["settings"] | left_out == found.settings.to_json() | left_out
    assert result["failed"] == {
        "share": 0.5,
        "below": 0.8,
        "seeds": [1],
        "crashed": {"3": "stopped: the loss is nan"},
    }
    heading, _, row = sweep.table(found, result).splitlines()
    assert "| unsupervised accuracy, % | best, % | failed (below 80.0 % or crashed) |" in heading
    assert "| 4 | 85.00 ± 13.23 | 95.00 | 2 of 4 | 10 |" in row


def test_the_threshold_can_be_chosen(tmp_path):
    words = ["infocapsgan", "--seeds", "0", "--out", str(tmp_path), "--failed-below", "0.95"]
    found = sweep.parse(words)
    write_run(found, 0, 0.9)
    result = sweep.summarise(found, {})
    assert result["failed"] == {"share": 1, "below": 0.95, "seeds": [0], "crashed": {}}
    assert result["metrics"]["unsupervised_accuracy"]["std"] == 0


def test_every_run_crashed(tmp_path):
    with pytest.raises(sweep.RunError, match="every run crashed"):
        sweep.summarise(sweep.parse(["capsnet", "--seeds", "0..1", "--out", str(tmp_path)]), {0: "", 1: ""})


def test_a_metric_that_a_run_lacks(tmp_path):
    found = sweep.parse(["infocapsgan", "--seeds", "0..1", "--out", str(tmp_path)])
    for seed, more in ((0, {}), (1, {"frechet_distance": 3.0})):
        write_run(found, seed, 0.9)
        file = found.run(seed) / "summary.json"
        summary = json.loads(file.read_text())
        file.write_text(json.dumps(summary | {"metrics": summary["metrics"] | more}))
    with pytest.raises(
        sweep.RunError, match="seed 0 has no frechet_distance, .* delete summary.json in .*seed-0"
    ):
        sweep.summarise(found, {})


def test_a_run_that_was_made_longer(tmp_path):
    found = sweep.parse(["infocapsgan", "--seeds", "0..1", "--max-steps", "5", "--out", str(tmp_path)])
    write_run(found, 0, 0.9)
    longer = sweep.parse(["infocapsgan", "--seeds", "1", "--max-steps", "7", "--out", str(tmp_path)])
    write_run(longer, 1, 0.9)
    with pytest.raises(
        sweep.RunError, match=r"seed 1 was trained on with other settings: max_steps 7; delete"
    ):
        sweep.summarise(found, {})


def test_less_is_better_of_an_error():
    assert best("squared_error", [3.0, 2.0]) == 2
    assert best("accuracy", [0.3, 0.2]) == 0.3
    assert best("class_capsule_length", [0.3, 0.2]) is None


def test_a_folder_is_for_one_sweep(tmp_path):
    words = ["capsnet", "--seeds", "0", "--out", str(tmp_path)]

    def claim(*words):
        with sweep.claimed(sweep.parse(words)):
            pass

    claim(*words)
    claim(*words[:2], "5..7", *words[3:])
    with pytest.raises(sweep.RunError, match="holds a sweep with other settings: epochs 15"):
        claim(*words, "--epochs", "2")
    with (
        sweep.claimed(sweep.parse(words)),
        pytest.raises(sweep.RunError, match="another sweep is still at work in"),
    ):
        claim(*words)
    (tmp_path / "sweep.json").unlink()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(sweep.RunError, match="is not empty and holds no sweep"):
        claim(*words)


def test_the_commits_of_all_starts(tmp_path, monkeypatch):
    chosen = sweep.parse(["capsnet", "--seeds", "0", "--out", str(tmp_path)])
    for commit, known in (("a1", "a1"), ("a1", "a1"), (None, "a1"), ("b2-dirty", "a1 / b2-dirty")):
        monkeypatch.setattr(engine, "_commit", lambda commit=commit: commit)
        with sweep.claimed(chosen) as commits:
            assert commits == known


def test_a_file_in_place_of_the_folder(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    words = ["capsnet", "--seeds", "0", "--out", str(tmp_path / "file" / "sweep")]
    monkeypatch.setattr(sys, "argv", ["sweep", *words])
    with pytest.raises(SystemExit, match="error: .*file"):
        sweep.main()


class LeftBehind(threading.Thread):
    """Trains the run of a seed for a moment, as the process that a killed sweep left behind."""

    def __init__(self, chosen, seed):
        super().__init__()
        self.chosen, self.seed, self.locked = chosen, seed, threading.Event()
        self.start()
        assert self.locked.wait(timeout=10)

    def run(self):
        path = self.chosen.run(self.seed)
        path.mkdir(parents=True)
        lock = lock_run(path)
        self.locked.set()
        time.sleep(0.3)
        write_run(self.chosen, self.seed, 0.9, exist_ok=True)
        lock.release()


def test_runs_that_a_killed_sweep_left_behind_are_waited_for(tmp_path, monkeypatch, capsys):
    chosen = sweep.parse(["infocapsgan", "--seeds", "0,1", "--out", str(tmp_path)])
    started = []

    class Ends:
        def __init__(self, command, **_):
            started.append(int(command[command.index("--seed") + 1]))
            assert (chosen.run(0) / "summary.json").exists()  # the run left behind counts as the one job
            write_run(chosen, started[-1], 0.9)

        def poll(self):
            return 0

    monkeypatch.setattr(engine.subprocess, "Popen", Ends)
    left = LeftBehind(chosen, 0)
    assert sweep.run_all(chosen) == {}
    left.join()
    assert started == [1]
    assert f"seed 0: another process trains {chosen.run(0)}; waiting for it" in capsys.readouterr().out


def test_a_run_left_behind_that_locks_its_folder_after_the_sweep_looked(tmp_path, monkeypatch):
    chosen = sweep.parse(["infocapsgan", "--seeds", "0", "--out", str(tmp_path)])
    left = []

    class Refused:
        def __init__(self, command, **_):
            left.append(LeftBehind(chosen, 0))

        def poll(self):
            return 1

    monkeypatch.setattr(engine.subprocess, "Popen", Refused)
    assert sweep.run_all(chosen) == {}
    assert len(left) == 1
    left[0].join()


def test_a_sweep_interrupted_and_taken_up_again(forked, tmp_path, monkeypatch, capsys):
    words = ["capsnet", "--seeds", "0,1", "--out", str(tmp_path / "sweep"), *TINY[:4]]
    words += ["--max-steps", "30", "--checkpoint-every", "1"]
    process = start(*words)
    while not checkpoints(tmp_path / "sweep" / "seed-0" / "checkpoints"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "the same command goes on" in err
    assert "interrupted after step" in (tmp_path / "sweep" / "seed-0.log").read_text()
    assert not (tmp_path / "sweep" / "seed-1").exists()
    assert not (tmp_path / "sweep" / "result.json").exists()

    def again(*more):
        monkeypatch.setattr(sys, "argv", ["sweep", *words, *more])
        sweep.main()
        return capsys.readouterr().out

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    out = again("--jobs", "2")
    result = json.loads((tmp_path / "sweep" / "result.json").read_text())
    keys = json.loads((ROOT / "results" / "digits.json").read_text())[0].keys()
    assert set(keys) <= set(result)
    assert result["seeds"] == [0, 1]
    assert len(set(result["metrics"]["squared_error"]["values"])) == 2
    assert "--seeds 0,1" in result["command"]
    assert (tmp_path / "sweep" / "result.md").read_text() in out
    rows = read_metrics(tmp_path / "sweep" / "seed-0")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [10, 20, 30]

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("seed-*/*.json")}
    assert re.match(r"seed 0: is finished: accuracy .*\nseed 1: is finished: accuracy .*\n\|", again())
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_a_crash_is_counted_and_the_others_go_on_and_are_evaluated(forked, tmp_path):
    settings = CapsNet(width=8, batch_size=8, max_steps=4).settings
    found = sweep.Sweep(
        name="capsnet",
        settings=settings,
        options=tuple(TINY),
        seeds=(0, 1),
        path=tmp_path,
        jobs=1,
        failed_below=None,
        evaluated=True,
    )
    found.run(0).mkdir()
    (found.run(0) / "config.json").write_text('{"system": "resnet", "settings": {}}')
    crashed = sweep.run_all(found)
    assert list(crashed) == [0]
    assert "was written by infocapsgan 0.1" in crashed[0]
    metrics = sweep.summarise(found, crashed)["metrics"]
    assert metrics["error"]["values"] == [1 - metrics["accuracy"]["best"]]


def test_as_many_runs_at_a_time_as_asked_for_and_all_on_one_device(tmp_path, monkeypatch):
    words = ["infocapsgan", "--seeds", "0..2", "--jobs", "2", "--evaluate", "--device", "cpu"]
    found = sweep.parse([*words, "--out", str(tmp_path)])
    running, most, commands = [], [], []

    class Process:
        def __init__(self, command, **_):
            self.words, self.polled = command[2:], False
            commands.append(self.words)
            running.append(self)
            most.append(len(running))

        def poll(self):
            if not self.polled:
                self.polled = True
                return None
            running.remove(self)
            if self.words[0] == "infocapsgan.train":
                write_run(found, int(self.words[self.words.index("--seed") + 1]), 0.9)
            else:
                Path(self.words[1], "evaluation.json").write_text("{}")
            return 0

    monkeypatch.setattr(engine.subprocess, "Popen", Process)
    assert sweep.run_all(found) == {}
    assert len(commands) == 6
    assert max(most) == 2
    for command in commands:
        assert command[command.index("--device") + 1] == "cpu"
