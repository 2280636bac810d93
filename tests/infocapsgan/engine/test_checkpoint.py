import json
import resource

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from infocapsgan.engine import checkpoint
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.run_directory import RunError
from infocapsgan.engine.train_state import TrainState
from infocapsgan.systems import CapsNet


@pytest.fixture
def system():
    return CapsNet(width=8)


def filled(system, value):
    system.model.encoder.conv.bias.data.fill_(value)
    return system


def bias_of(path):
    return load_file(path / checkpoint.WEIGHTS)["model.encoder.conv.bias"].unique().tolist()


def test_the_best_are_those_with_the_lowest_loss(tmp_path, system):
    assert checkpoint.read_best(tmp_path) is None
    for step, loss in ((1, 3.0), (2, 0.1), (3, 0.1), (4, 2.0)):
        checkpoint.save_best(tmp_path, filled(system, step), step, loss)
    assert bias_of(tmp_path / "best") == [2]
    assert checkpoint.read_best(tmp_path) == {"step": 2, "validation_loss": 0.1}
    checkpoint.load_best(tmp_path, system)
    assert (system.model.encoder.conv.bias == 2).all()


def test_a_loss_that_is_not_finite_is_not_the_lowest(tmp_path, system):
    checkpoint.save_best(tmp_path, filled(system, 1), 1, float("nan"))
    checkpoint.save_best(tmp_path, filled(system, 2), 2, 1.0)
    assert bias_of(tmp_path / "best") == [2]


@pytest.mark.parametrize("killed_at", ["os.replace", "os.fsync"])
def test_the_best_are_there_until_better_ones_are(killed_at, tmp_path, system, monkeypatch):
    checkpoint.save_best(tmp_path, filled(system, 1), 1, 3.0)
    monkeypatch.setattr(killed_at, None)
    with pytest.raises(TypeError):
        checkpoint.save_best(tmp_path, filled(system, 2), 2, 1.0)
    assert bias_of(tmp_path / "best") == [1]
    assert checkpoint.read_best(tmp_path) == {"step": 1, "validation_loss": 3}


def test_a_state_that_is_saved_already_is_left_alone(tmp_path, system):
    state = checkpoint.capture(system, TrainState(system.optimizers, ShardedGenerator(0)))
    path = checkpoint.save(tmp_path, state, seconds=1.0)
    before = {file: file.stat().st_ino for file in path.iterdir()}
    assert checkpoint.save(tmp_path, state, seconds=2.0) == path
    assert {file: file.stat().st_ino for file in path.iterdir()} == before


def test_an_unfinished_checkpoint_is_none(tmp_path):
    for name in ("step-00000010", "step-00000002", ".step-00000030.99.tmp"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000002", "step-00000010"]


def saved(folder, system, *steps):
    """A checkpoint of each step."""
    state = TrainState(system.optimizers, ShardedGenerator(0))
    for state.step in steps:
        yield checkpoint.save(folder, checkpoint.capture(system, state), seconds=1.0)


STATE = {"step": 2, "device": "cpu", "seconds": 1.0, "optimizers": {}, "scalers": {}}
DAMAGES = [
    ("weights.safetensors", b""),
    ("weights.safetensors", b"\x80\x04garbage"),
    ("training.safetensors", b"[]"),
    ("training.safetensors", None),
    ("state.json", b""),
    ("state.json", b"{"),
    ("state.json", b"[]"),
    ("state.json", b"[" * 100_000),
    ("state.json", b"\xff"),
    *(
        ("state.json", json.dumps({key: STATE[key] for key in STATE if key != lost}).encode())
        for lost in STATE
    ),
    ("state.json", json.dumps(STATE | {"step": "2"}).encode()),
    ("state.json", json.dumps(STATE | {"step": 1}).encode()),
    ("state.json", json.dumps(STATE | {"optimizers": []}).encode()),
]


@pytest.mark.parametrize(("name", "content"), DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(name, content, tmp_path, system, capsys):
    before, newest = saved(tmp_path, system, 1, 2)
    damage(newest / name, content)
    snapshot, path = checkpoint.load_newest(tmp_path)
    assert (snapshot.numbers["step"], path) == (1, before)
    assert f"warning: the checkpoint {newest} is damaged: " in capsys.readouterr().err
    checkpoint.load_newest(tmp_path, warn=False)
    assert capsys.readouterr().err == ""


def damage(file, content):
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)


def test_weights_that_were_cut(tmp_path, system):
    (path,) = saved(tmp_path, system, 1)
    damage(path / "weights.safetensors", (path / "weights.safetensors").read_bytes()[:-1])
    with pytest.raises(RunError, match=f"{path} is damaged: .*; no other checkpoint is intact"):
        checkpoint.load_newest(tmp_path)


def test_no_checkpoint_at_all(tmp_path):
    assert checkpoint.load_newest(tmp_path) is None


def test_a_damaged_checkpoint_is_replaced_by_the_same_step(tmp_path, system):
    _, newest = saved(tmp_path, system, 1, 2)
    damage(newest / "state.json", b"")
    assert list(saved(tmp_path, system, 2)) == [newest]
    assert checkpoint.load_newest(tmp_path)[1] == newest


@pytest.mark.parametrize("content", [b"", b"garbage", b"cut"])
def test_the_best_are_damaged(content, tmp_path, system):
    checkpoint.save_best(tmp_path, system, 1, 3.0)
    path = tmp_path / "best" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] if content == b"cut" else content)
    with pytest.raises(RunError, match=f"{path} is damaged"):
        checkpoint.read_best(tmp_path)


@pytest.mark.parametrize("state", ["[]", '{"step": 1}', '{"step": "1", "validation_loss": 1}'])
def test_the_best_of_another_version(state, tmp_path, system):
    (tmp_path / "best").mkdir()
    save_file(system.state_dict(), tmp_path / "best" / "weights.safetensors", {"state": state})
    with pytest.raises(RunError, match="was written by another version of infocapsgan"):
        checkpoint.read_best(tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left")])
def test_no_room_for_a_checkpoint(error, tmp_path, system, monkeypatch):
    list(saved(tmp_path, system, 1))

    def no_room(*_):
        raise error

    monkeypatch.setattr(checkpoint, "save_file", no_room)
    with pytest.raises(RunError, match="step-00000002 cannot be written: No space left"):
        list(saved(tmp_path, system, 2))
    with pytest.raises(RunError, match="best cannot be written: No space left"):
        checkpoint.save_best(tmp_path, system, 2, 1.0)
    assert [path.name for path in tmp_path.iterdir() if path.name != "best"] == ["step-00000001"]


def test_no_room_on_a_real_disk(tmp_path, system):
    """The limit on the size of a file is the nearest that a test can make."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(RunError, match="step-00000001 cannot be written: .*File too large"):
            list(saved(tmp_path, system, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_removed_under_training(tmp_path, system):
    with pytest.raises(RunError, match="gone was removed while the run was training"):
        list(saved(tmp_path / "gone", system, 1))
    with pytest.raises(RunError, match="best cannot be written"):
        checkpoint.save_best(tmp_path / "gone", system, 1, 1.0)
    assert not (tmp_path / "gone").exists()


def test_random_numbers_of_another_device_start_anew(system):
    state = TrainState(system.optimizers, ShardedGenerator(3))
    state.rng.uniform(5), torch.rand(5)
    snapshot = checkpoint.capture(system, state)

    def following():
        checkpoint.restore(snapshot, system, state)
        return torch.cat([state.rng.uniform(4), torch.rand(4)])

    same = following()
    snapshot.numbers["device"], snapshot.tensors["generator.draw"] = (
        "cuda",
        torch.zeros(16, dtype=torch.uint8),
    )
    anew = following()
    assert torch.equal(anew, following())
    assert not torch.equal(anew, same)
    snapshot.numbers["step"] = 7
    assert not torch.equal(anew, following())
