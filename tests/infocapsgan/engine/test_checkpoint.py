import pytest
from safetensors.torch import load_file

from infocapsgan.engine import checkpoint
from infocapsgan.engine.rng import ShardedGenerator
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
