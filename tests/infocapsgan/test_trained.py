import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from infocapsgan import evaluate, visualize
from infocapsgan.data import DataError
from infocapsgan.engine import loaded_run as trained
from infocapsgan.engine.checkpoint import checkpoints, save_best
from infocapsgan.engine.loop import train
from infocapsgan.engine.run_directory import RunError
from infocapsgan.systems import CapsNet


@pytest.fixture
def copy(run_of, tmp_path):
    return shutil.copytree(run_of("capsnet"), tmp_path / "copy")


def test_the_weights_are_those_of_the_last_checkpoint(run_of, trained_as):
    found, last = trained_as("capsnet"), checkpoints(run_of("capsnet") / "checkpoints")[-1]
    assert found.weights == (last, 4)
    saved = load_file(last / "weights.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in found.system.state_dict().items())
    assert not found.system.training
    assert len(found.dataset.test_labels) == 360


def test_weights_that_a_validation_chose_come_first(copy, trained_as):
    best = copy / "checkpoints" / "best"
    system = trained_as("capsnet").system
    system.model.encoder.conv.bias.fill_(7)
    save_best(copy / "checkpoints", system, 1200, 0.5)
    found = trained.load(copy, device="cpu")
    assert found.weights == (best, 1200)
    assert found.title == "capsnet on digits (recipe tuned, seed 0), best weights, step 1,200"
    assert (found.system.model.encoder.conv.bias == 7).all()
    save_file(load_file(best / "weights.safetensors"), best / "weights.safetensors")
    with pytest.raises(RunError, match="was written by another version of infocapsgan"):
        trained.load(copy, device="cpu")


def test_what_is_no_run_or_not_readable(copy, tmp_path):
    with pytest.raises(RunError, match="is not a run directory"):
        trained.load(tmp_path)
    config = json.loads((copy / "config.json").read_text())
    for changed, message in (
        (config | {"system": "resnet"}, "holds a run of 'resnet', which is none of infocapsgan"),
        ({**config, "settings": config["settings"] | {"depth": 3}}, "by another version.*depth"),
        ({**config, "settings": config["settings"] | {"width": 16}}, "do not fit this system.*size mismatch"),
        ({**config, "settings": config["settings"] | {"dataset": "x"}}, "by another version.*--dataset"),
    ):
        (copy / "config.json").write_text(json.dumps(changed))
        with pytest.raises(RunError, match=f"(?s){message}"):
            trained.load(copy)
    folder = config["settings"] | {"dataset": "folder", "data_dir": str(tmp_path / "gone")}
    (copy / "config.json").write_text(json.dumps(config | {"settings": folder}))
    with pytest.raises(DataError, match="--data-dir: got .*gone, takes the directory of images"):
        trained.load(copy)
    (copy / "config.json").write_text(json.dumps(config))
    if not torch.cuda.is_available():
        with pytest.raises(RunError, match="--device: got cuda, but torch finds no GPU"):
            trained.load(copy, device="cuda")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(RunError, match="has no checkpoint yet; train on with --resume"):
        trained.load(copy)


def test_images_that_were_moved_since_the_training(tmp_path, monkeypatch, capsys):
    for name, value in (("dark", 0), ("light", 255)):
        (tmp_path / "before" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("L", (32, 32), value).save(tmp_path / "before" / name / f"{number}.png")
    path = tmp_path / "run"
    options = {"dataset": "folder", "data_dir": tmp_path / "before", "device": "cpu", "width": 8}
    train(CapsNet, CapsNet(batch_size=4, max_steps=1, out=path, **options).settings)
    (tmp_path / "before").rename(tmp_path / "now")
    for main, words in ((evaluate.main, [path]), (visualize.main, [path, "reconstruct"])):
        monkeypatch.setattr("sys.argv", ["program", *map(str, words)])
        with pytest.raises(SystemExit, match="error: --data-dir: got .*before, takes the directory"):
            main()
        monkeypatch.setattr("sys.argv", ["program", *map(str, words), "--data-dir", str(tmp_path / "now")])
        main()
        assert "written to" in capsys.readouterr().out
