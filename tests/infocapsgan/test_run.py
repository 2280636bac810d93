import dataclasses
import json

import pytest
import torch
from PIL import Image

from infocapsgan.engine.atomic import atomic_file, atomic_folder, remove_unfinished
from infocapsgan.engine.checkpoint import checkpoints
from infocapsgan.engine.run_directory import Run, RunError, alone, read_config, read_metrics
from infocapsgan.plotting.png import grid, save_curves, save_png
from infocapsgan.systems import CapsNet


def settings(out):
    return dataclasses.replace(CapsNet.defaults(), out=out)


def write_half(context, name):
    with context as temporary:
        (temporary / name).write_text("half")
        raise KeyError


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(KeyError):
        write_half(atomic_file(path), "")
    assert path.read_text() == "before"
    with atomic_file(path) as temporary:
        temporary.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_whole_or_not_there(tmp_path):
    path = tmp_path / "folder"
    with pytest.raises(KeyError):
        write_half(atomic_folder(path), "a")
    assert list(tmp_path.iterdir()) == []
    for content in ("first", "second"):
        with atomic_folder(path) as temporary:
            (temporary / "a").write_text(content)
        assert (path / "a").read_text() == content
    with atomic_folder(path, keep=True) as temporary:
        (temporary / "a").write_text("third")
    assert (path / "a").read_text() == "second"
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    path.mkdir()
    for name in "ab":
        (path / name).touch()
    monkeypatch.setattr("os.replace", None)  # as if killed at the first thing that is done to the folder
    with pytest.raises(TypeError), atomic_folder(path) as temporary:
        (temporary / "a").touch()
    assert sorted(file.name for file in path.iterdir()) == ["a", "b"]


def test_what_killed_processes_left_is_removed(tmp_path):
    (tmp_path / "best").mkdir()
    for path in (tmp_path / "best" / ".weights.safetensors.7.tmp", tmp_path / "best" / "weights.safetensors"):
        path.touch()
    for name in (".step-00000003.7.tmp", "step-00000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").touch()
    remove_unfinished(tmp_path)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "best",
        "best/weights.safetensors",
        "step-00000002",
        "step-00000002/state.json",
    ]


def test_an_unfinished_checkpoint_is_none(tmp_path):
    for name in ("step-00000010", "step-00000002", ".step-00000030.99.tmp"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002", "step-00000010"]


def test_new_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("0001-capsnet-digits", "0002-capsnet-digits"):
        with Run.create("capsnet", settings(None)) as run:
            pass
        assert run.path.name == name
    config = json.loads((run.path / "config.json").read_text())
    assert config["system"] == "capsnet"
    assert config["settings"]["dataset"] == "digits"


def test_a_run_does_not_overwrite_another(tmp_path):
    with Run.create("capsnet", settings(tmp_path / "new")):
        pass
    with pytest.raises(RunError, match="continue a run with --resume"):
        Run.create("capsnet", settings(tmp_path / "new"))


def test_what_was_logged_after_the_checkpoint_is_dropped(tmp_path):
    with Run.create("capsnet", settings(tmp_path / "run")) as run:
        for step in (1, 2, 3):
            run.log("train", step, step / 2, {"loss": 0.5})
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # what a kill leaves
    assert [row["step"] for row in read_metrics(run.path)] == [1, 2, 3]
    with Run(tmp_path / "run", alone(tmp_path / "run"), resume_step=2):
        pass
    assert read_metrics(run.path) == [
        {"kind": "train", "step": step, "epoch": step / 2, "loss": 0.5} for step in (1, 2)
    ]


def test_one_training_at_a_time_in_a_directory(tmp_path):
    message = "is still being trained, by another process"
    with Run.create("capsnet", settings(tmp_path / "run")) as run, pytest.raises(RunError, match=message):
        alone(run.path)
    alone(tmp_path / "run").release()
    with pytest.raises(RunError, match="none is not a run directory"):
        alone(tmp_path / "none")


def test_what_is_no_run_directory(tmp_path):
    with pytest.raises(RunError, match="has no config.json"):
        read_config(tmp_path)
    for text in ("{", "[]", '{"model_type": "bert"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(RunError, match="is not a run directory"):
            read_config(tmp_path)
    with pytest.raises(RunError, match="is not a run directory"):
        read_config(tmp_path / "config.json")


def test_grid_by_hand():
    black, white = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    picture = grid(torch.stack([black, white, white]), 2, gap=1)
    assert picture.shape == (4, 4, 3)
    assert picture[:, :, 0].tolist() == [
        [0, 128, 255, 128],
        [128, 128, 128, 128],
        [255, 128, 128, 128],
        [128, 128, 128, 128],
    ]


def test_colours_stay(tmp_path):
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    save_png(tmp_path / "red.png", grid(red, 1, gap=0), enlarge=3)
    picture = Image.open(tmp_path / "red.png")
    assert picture.size == (6, 6)
    assert picture.getpixel((5, 5)) == (255, 0, 0)


def test_curves(tmp_path):
    rows = [{"kind": "train", "step": 1, "epoch": 0.1, "loss": 2.0, "real_accuracy": 0.5}]
    rows += [{"kind": "evaluation", "step": 1, "epoch": 0.1, "accuracy": 0.3}]
    save_curves(tmp_path / "curves.png", rows, "accuracy", {"chance": 0.1})
    assert Image.open(tmp_path / "curves.png").size[0] > 500
