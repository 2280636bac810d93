import dataclasses
import json
import shutil

import pytest
import torch
from PIL import Image

from capsops import dispatch
from infocapsgan.data import DataError
from infocapsgan.engine import start
from infocapsgan.engine.checkpoint import checkpoints
from infocapsgan.engine.command_line import parse
from infocapsgan.engine.distributed import Processes
from infocapsgan.engine.loop import train
from infocapsgan.engine.run_directory import NoRunDirectory, RunError, read_config, read_metrics, write_config
from infocapsgan.engine.start import check_batch_size, prepare, sized
from infocapsgan.systems import DCGAN, CapsNet, InfoCapsGAN, InfoGAN

CPU = torch.device("cpu")


def small(**options):
    return CapsNet(width=8, device="cpu", **({"batch_size": 8, "max_steps": 2} | options)).settings


@pytest.fixture
def run(run_of, tmp_path):
    """A run of four steps of CapsNet, with checkpoints after the second and the last."""
    return shutil.copytree(run_of("capsnet"), tmp_path / "copy")


def resume(run, *words):
    return train(*parse(["--resume", str(run), *map(str, words)]))


def folder(root, images):
    """As many images of each of two classes as `images`."""
    for label, name in enumerate("ab"):
        (root / name).mkdir(parents=True)
        for n in range(images):
            Image.new("L", (32, 32), 120 * label + n).save(root / name / f"{n}.png")
    return root


def test_weights_and_order_and_random_numbers_follow_from_the_seed():
    seen = []
    for seed in (0, 1, 0):
        made = prepare(CapsNet, small(seed=seed), NoRunDirectory(), Processes(), CPU)
        weights = next(made.system.parameters()).detach().clone()
        seen.append((weights, made.batches.indices(0), made.state.rng.uniform(8)))
    for first, second, third in zip(*seen, strict=True):
        assert torch.equal(first, third)
        assert not torch.equal(first, second)


def test_what_is_said_at_the_start(tmp_path, capsys):
    settings = small(impl="cpu", validation=True, out=tmp_path / "run")
    train(CapsNet, settings)
    said = capsys.readouterr().err
    assert "data: digits: 1293 training, 360 test, 144 validation images of 1 × 28 × 28, 10 classes" in said
    assert "steps: 161 an epoch with batches of 8, 2 in all\n" in said
    assert f"run directory: {tmp_path / 'run'}\n" in said
    assert "capsule kernels: cpu\n" in said
    assert "warning" not in said
    resume(tmp_path / "run", "--max-steps", 3)
    assert "3 in all, of which 2 are done" in capsys.readouterr().err


def test_the_names_of_many_classes_are_cut(capsys):
    made = prepare(CapsNet, small(), NoRunDirectory(), Processes(), CPU)
    object.__setattr__(made.dataset, "class_names", tuple("abcdefghijklm"))
    assert next(start.report(made)).endswith("10 classes (a, b, c, d, e, f, g, h, …, m)")
    object.__setattr__(made.dataset, "class_names", tuple("abc"))
    assert next(start.report(made)).endswith("10 classes (a, b, c)")


def test_plain_pytorch_is_a_warning_where_there_are_capsules(monkeypatch):
    monkeypatch.setattr(start, "serving_impl", lambda *_: ("reference", "cpu: not built"))
    warning = "warning: the capsules are computed by plain PyTorch, which is slower: cpu: not built"
    made = prepare(CapsNet, small(), NoRunDirectory(), Processes(), CPU)
    assert warning in list(start.report(made))
    settings = DCGAN(width=8, generator_width=8, batch_size=8).settings
    made = prepare(DCGAN, settings, NoRunDirectory(), Processes(), CPU)
    assert not any("capsule" in line for line in start.report(made))


def test_one_process_of_several_says_it(capsys, monkeypatch):
    monkeypatch.setattr(Processes, "gather", lambda self, here, device: [here] * 2)
    prepare(CapsNet, small(), NoRunDirectory(), Processes(1, 2), CPU)
    assert capsys.readouterr().err == ""


def test_the_directory_is_made_before_the_data_are_read(tmp_path, monkeypatch):
    seen = []

    def broken(system):
        seen.append((tmp_path / "run").is_dir())
        raise DataError("no data")

    monkeypatch.setattr(CapsNet, "load_data", broken)
    with pytest.raises(DataError):
        train(CapsNet, small(out=tmp_path / "run"))
    assert seen == [True]
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="--out: "):
        train(CapsNet, small(out=tmp_path / "file" / "run"))
    assert seen == [True]


def test_config_holds_what_loading_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(CapsNet, small(out=tmp_path / "run", data_dir="data"))
    config = read_config(tmp_path / "run")
    assert (config.system, config.image_shape) == ("capsnet", {"channels": 1, "size": 28, "classes": 10})
    assert config.settings["data_dir"] == str(tmp_path / "data")
    write_config(tmp_path / "run", config._replace(class_names=["zero", "one"]))
    resume(tmp_path / "run", "--max-steps", 3)
    resumed = read_config(tmp_path / "run")
    assert (resumed.class_names, resumed.settings["max_steps"]) == (["zero", "one"], 3)


def test_images_that_are_not_those_of_the_run(tmp_path):
    root = folder(tmp_path / "images", 20)
    train(CapsNet, small(dataset="folder", data_dir=root, out=tmp_path / "run"))
    (root / "a" / "0.png").rename(root / "a" / "new.png")
    with pytest.raises(RunError, match=r"--resume: since .*run began, images were added: a/new\.png$"):
        resume(tmp_path / "run", "--max-steps", 6)
    (root / "a" / "new.png").unlink()
    with pytest.raises(RunError, match=r"images are missing: a/0\.png$"):
        resume(tmp_path / "run", "--max-steps", 6)


def test_only_some_images_are_named():
    before, here = {"train": ["1"], "test": ["2"]}, {"train": list("123456"), "test": []}
    with pytest.raises(RunError, match="images were added: 3, 4, 5, …"):
        start._check_split("run", before, here)
    start._check_split("run", before, {"train": ("1",), "test": ("2",)})
    start._check_split("run", None, None)


def test_a_damaged_newest_checkpoint(run, run_of, capsys):
    newest = checkpoints(run / "checkpoints")[-1]
    (newest / "training.safetensors").write_bytes(b"garbage")
    resume(run)
    assert f"warning: the checkpoint {newest} is damaged" in capsys.readouterr().err
    whole = run_of("capsnet") / "checkpoints" / newest.name
    for name in ("weights.safetensors", "training.safetensors"):
        assert (newest / name).read_bytes() == (whole / name).read_bytes()
    steps, wanted = ([row["step"] for row in read_metrics(path)] for path in (run, run_of("capsnet")))
    assert steps == wanted


def test_a_damaged_checkpoint_whose_step_does_not_come_again(run):
    newest = checkpoints(run / "checkpoints")[-1]
    (newest / "state.json").write_bytes(b"")
    resume(run, "--max-steps", 3)
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-00000002", "step-00000003"]


def test_no_checkpoint_that_is_intact(run):
    for path in checkpoints(run / "checkpoints"):
        (path / "weights.safetensors").unlink()
    with pytest.raises(RunError, match=r"step-00000004 is damaged: .*; no other checkpoint is intact"):
        resume(run, "--max-steps", 6)
    assert len(checkpoints(run / "checkpoints")) == 2


def test_the_best_weights_are_damaged(tmp_path):
    train(CapsNet, small(validation=True, out=tmp_path / "run"))
    best = tmp_path / "run" / "checkpoints" / "best" / "weights.safetensors"
    best.write_bytes(b"garbage")
    with pytest.raises(RunError, match=f"{best} is damaged"):
        resume(tmp_path / "run", "--max-steps", 3)


def change_state(run, **values):
    newest = checkpoints(run / "checkpoints")[-1]
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps(state | values))


def test_a_run_goes_on_on_another_kind_of_device(run, capsys):
    change_state(run, device="cuda")
    resume(run, "--max-steps", 6)
    assert (
        "warning: the run was trained on cuda and goes on on cpu: random numbers" in capsys.readouterr().err
    )
    resume(run, "--max-steps", 7)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("optimizers", [{}, {"model": 5}, {"model": [{}]}, {"model": []}])
def test_a_state_that_does_not_fit(optimizers, run):
    change_state(run, optimizers=optimizers)
    with pytest.raises(RunError, match="--resume: .*step-00000004 was written by another version"):
        resume(run, "--max-steps", 6)


def test_an_option_of_a_wrong_type_is_named(run, capsys):
    config = read_config(run)
    write_config(run, config._replace(settings=config.settings | {"batch_size": 2.5}))
    with pytest.raises(SystemExit):
        parse(["--resume", str(run)])
    assert "--batch-size: got 2.5, takes a whole number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("system", "images", "options", "wanted"),
    [
        (CapsNet, 144, {}, (16, 167)),
        (CapsNet, 20, {}, (8, 750)),
        (CapsNet, 5, {}, (5, 1500)),
        (CapsNet, 100_000, {}, (128, 30)),
        (CapsNet, 144, {"max_steps": 9000}, (16, 1000)),
        (CapsNet, 144, {"batch_size": 48}, (48, 500)),
        (CapsNet, 144, {"epochs": 3}, (16, 3)),
        (InfoGAN, 100_000, {"recipe": "published"}, (256, 50)),
        (DCGAN, 144, {"recipe": "published"}, (16, 10_000)),
    ],
)
def test_batch_size_and_epochs_of_a_folder(system, images, options, wanted):
    settings = system.defaults(options.pop("recipe", "tuned"), "folder")
    assert sized(system, dataclasses.replace(settings, **options), images) == wanted


def test_other_data_sets_keep_theirs():
    settings = InfoCapsGAN.defaults()
    assert sized(InfoCapsGAN, settings, 30) == (settings.batch_size, settings.epochs)


def test_what_was_chosen_for_a_folder_is_recorded(tmp_path, capsys):
    root = folder(tmp_path / "images", 50)
    settings = small(dataset="folder", data_dir=root, batch_size=None, out=tmp_path / "run")
    train(CapsNet, settings)
    chosen = read_config(tmp_path / "run").settings
    assert (chosen["batch_size"], chosen["epochs"]) == (8, 150)
    said = capsys.readouterr().err
    assert f"data: folder in {root}: 80 training, 20 test images of 1 × 32 × 32, 2 classes (a, b)\n" in said
    assert "steps: 10 an epoch with batches of 8, 2 in all" in said


def test_batch_norm_takes_two_images(tmp_path):
    settings = InfoGAN(width=8, batch_size=1, max_steps=1, out=tmp_path / "run").settings
    with pytest.raises(ValueError, match="--batch-size: got 1, takes at least 2 with batch norm"):
        train(InfoGAN, settings)
    assert not (tmp_path / "run").exists()
    check_batch_size(CapsNet(width=8), 1, 1)
    with pytest.raises(ValueError, match="--batch-size: got 2, takes at least 4 with batch norm"):
        check_batch_size(InfoGAN(width=8), 2, 2)


def test_processes_share_a_batch_evenly():
    with pytest.raises(ValueError, match="--batch-size: got 8, takes a multiple of the 3 processes"):
        prepare(CapsNet, small(), NoRunDirectory(), Processes(0, 3), CPU)


def test_a_resumed_run_keeps_the_kernels_that_it_began_with(tmp_path, monkeypatch):
    asked = []

    def restrict(device, proofs):
        asked.append(proofs)
        return {"triton": "common"}

    monkeypatch.setattr(dispatch, "settle", lambda device: {"triton": "here"})
    monkeypatch.setattr(dispatch, "restrict", restrict)
    train(CapsNet, small(out=tmp_path / "run"))
    assert read_config(tmp_path / "run").kernels == {"cpu": {"triton": "common"}}
    resume(tmp_path / "run", "--max-steps", 3)
    assert asked == [[{"triton": "here"}], [{"triton": "here"}, {"triton": "common"}]]
