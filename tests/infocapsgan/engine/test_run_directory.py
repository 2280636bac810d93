import dataclasses
import json

import pytest

from infocapsgan.engine import run_directory
from infocapsgan.engine.run_directory import (
    Config,
    RunDirectory,
    RunError,
    lock_run,
    read_config,
    read_metrics,
    write_config,
    writing,
)
from infocapsgan.systems import CapsNet

SHAPE = {"channels": 1, "size": 28, "classes": 2}
CONFIG = Config("capsnet", CapsNet.defaults().to_json(), SHAPE, ["a", "b"], {"train": ["a/1.png"]})


def create(out):
    return RunDirectory.open("capsnet", dataclasses.replace(CapsNet.defaults(), out=out))


def no_room(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.fixture
def run(tmp_path):
    """A run directory with three rows."""
    with create(tmp_path / "run") as made:
        made.begin(CONFIG)
        for step in (1, 2, 3):
            made.log("train", step, step / 2, {"loss": 0.5})
    return tmp_path / "run"


def test_new_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("0001-capsnet-digits", "0002-capsnet-digits"):
        with create(None) as run:
            run.begin(CONFIG)
        assert run.path.name == name


def test_a_number_that_another_process_took_meanwhile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed, iterdir = [], run_directory.Path.iterdir

    def late(path):
        found = list(iterdir(path))
        if path.name == "runs" and not listed:
            listed.append((path / "0001-capsnet-digits").mkdir())
        return iter(found)

    monkeypatch.setattr(run_directory.Path, "iterdir", late)
    with create(None) as run:
        assert run.path.name == "0002-capsnet-digits"


def test_a_run_does_not_overwrite_another(run, tmp_path):
    with pytest.raises(RunError, match="continue a run with --resume"):
        create(run)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="continue a run with --resume"):
        create(tmp_path / "file")


@pytest.mark.parametrize("out", [None, "new"])
def test_a_start_that_fails_leaves_no_directory(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyError), create(out and tmp_path / out):
        raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ([] if out else ["runs"])


def test_a_directory_of_a_start_that_was_killed_is_used_again(tmp_path):
    killed = create(tmp_path / "run")
    killed._lock.release()
    with create(tmp_path / "run") as run:
        run.begin(CONFIG)
    assert read_config(tmp_path / "run") == CONFIG


def test_what_another_put_into_a_failed_start_stays(tmp_path):
    with create(tmp_path / "run"):
        (tmp_path / "run" / "notes").touch()
    assert (tmp_path / "run" / "notes").exists()


@pytest.mark.parametrize(
    ("out", "reason"), [("file/run", "Not a directory"), ("n" * 300, "File name too long")]
)
def test_a_directory_that_cannot_be_made(out, reason, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=f"--out: {tmp_path / out}.* cannot be written: {reason}"):
        create(tmp_path / out)


def test_a_folder_that_is_read_only(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(run_directory.Path, "mkdir", refuse)  # root may write to a folder of any mode
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="--out: runs cannot be written: Permission denied"):
        create(None)


def test_the_error_of_a_write_names_its_file(tmp_path):
    with pytest.raises(RunError, match=f"{tmp_path} cannot be written: No space left"), writing(tmp_path):
        no_room()
    with pytest.raises(RunError, match="other/file cannot be written: No such file"), writing(tmp_path):
        (tmp_path / "other" / "file").touch()


def fill_the_disk(run, file):
    """Trains on in `run` until metrics.jsonl, or the file of events, has no room."""
    with RunDirectory(run) as resumed:
        resumed.begin(CONFIG, 3)
        resumed.log("train", 4, 2.0, {"loss": 0.5})
        full = open("/dev/full", "a" if file == "metrics" else "ab")  # noqa: SIM115
        if file == "metrics":
            resumed._metrics = full
        else:
            resumed._events._records._writer = resumed._events._file = full
        resumed.log("train", 5, 2.5, {"loss": 0.5})


@pytest.mark.parametrize("file", ["metrics", "events"])
def test_a_row_on_a_full_disk(file, run):
    with pytest.raises(RunError, match=r"run.* cannot be written: No space"):
        fill_the_disk(run, file)
    assert [row["step"] for row in read_metrics(run)][:4] == [1, 2, 3, 4]
    lock_run(run).release()


def test_a_file_that_cannot_be_closed_releases_the_lock(run, monkeypatch):
    resumed = RunDirectory(run)
    resumed.begin(CONFIG, 3)
    monkeypatch.setattr(resumed._events, "close", no_room)
    with pytest.raises(RunError, match="run cannot be written: No space"), resumed:
        pass
    lock_run(run).release()


def test_what_was_logged_after_the_checkpoint_is_dropped(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # what a kill leaves
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3]
    with RunDirectory(run) as resumed:
        resumed.begin(CONFIG, 2)
    assert read_metrics(run) == [
        {"kind": "train", "step": step, "epoch": step / 2, "loss": 0.5} for step in (1, 2)
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"\0" * 40,
        b'{"kind": "train", "st',
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b"5",
        b'{"kind": "train"}',
        b'{"kind": "train", "step": "3", "epoch": 1}',
        b'{"kind": 1, "step": 3, "epoch": 1}',
        b'{"kind": "train", "step": 3, "epoch": 1, "loss": "low"}',
    ],
)
def test_damaged_rows(line, run, capsys):
    rows = read_metrics(run)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    assert read_metrics(run) == rows
    assert capsys.readouterr().err == ""
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(rows[0]) + "\n")
    assert read_metrics(run) == [*rows, rows[0]]
    assert f"warning: {run / 'metrics.jsonl'}: 1 damaged rows are left out" in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_kept(run):
    with RunDirectory(run) as resumed:
        resumed.begin(CONFIG, 3)
        resumed.log("evaluation", 4, 2.0, {"nmi": float("nan"), "loss": float("inf")})
    assert read_metrics(run)[-1]["loss"] == float("inf")


def test_what_killed_processes_left_is_removed_when_a_run_begins(run):
    for name in (".curves.png.7.tmp", "samples/.samples-00000002.png.7.tmp"):
        (run / name).touch()
    (run / "checkpoints" / ".step-00000002.7.tmp").mkdir()
    with RunDirectory(run) as resumed:
        resumed.begin(CONFIG, 2)
    assert not list(run.rglob(".*.tmp"))


def test_one_training_at_a_time_in_a_directory(tmp_path):
    with (
        create(tmp_path / "run") as run,
        pytest.raises(RunError, match="is still being trained, by another process"),
    ):
        RunDirectory(run.path)
    with pytest.raises(RunError, match="none is not a run directory"):
        RunDirectory(tmp_path / "none")


def test_what_is_no_run_directory(tmp_path):
    with pytest.raises(RunError, match="has no config.json"):
        read_config(tmp_path)
    for text in ("{", "[]", '{"model_type": "bert"}', "[" * 100_000, "\0"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(RunError, match="is not a run directory"):
            read_config(tmp_path)
    with pytest.raises(RunError, match="is not a run directory"):
        read_config(tmp_path / "config.json")


def test_a_run_of_another_version_says_which(tmp_path):
    old = {"system": "capsnet", "settings": {}}
    for config, message in (
        (old, r"by infocapsgan 0\.1, in format 1; takes format 2: use that version, or train"),
        (old | {"format": 3, "version": "0.9"}, r"by infocapsgan 0\.9, in format 3; takes format 2"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(RunError, match=message):
            read_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("system", []),
        ("settings", []),
        ("image_shape", None),
        ("image_shape", {"channels": 1, "size": 28}),
        ("image_shape", {"channels": 1, "size": 28, "classes": "2"}),
        ("class_names", "ab"),
        ("class_names", [1, 2]),
        ("split", []),
        ("split", {"train": [1]}),
    ],
)
def test_a_damaged_config(name, value, tmp_path):
    write_config(tmp_path, CONFIG._replace(**{name: value}))
    with pytest.raises(RunError, match=f"config.json is damaged: {name}"):
        read_config(tmp_path)


def test_a_config_is_read_as_it_was_written(tmp_path):
    for config in (CONFIG, CONFIG._replace(split=None, class_names=[])):
        write_config(tmp_path, config)
        assert read_config(tmp_path) == config
