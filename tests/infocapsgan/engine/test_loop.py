"""The command as a user runs it, in a process of its own."""

import functools
import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import capsops
from capsops.dispatch import requested
from infocapsgan import data
from infocapsgan.engine import checkpoint, loop
from infocapsgan.engine.checkpoint import checkpoints
from infocapsgan.engine.command_line import parse
from infocapsgan.engine.loop import Interruption, train
from infocapsgan.engine.run_directory import RunDirectory, RunError, read_metrics
from infocapsgan.engine.train_state import NonFiniteLossError
from infocapsgan.metrics.matching import kmeans_accuracy
from infocapsgan.systems import DCGAN, SYSTEMS, CapsNet, InfoCapsGAN, System
from infocapsgan.train import main
from tests.processes import ROOT, start_python

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
SMALL = ["--width", "8", "--batch-size", "8", "--evaluate-every", "100", "--checkpoint-every", "5"]


@pytest.fixture(autouse=True)
def heeded_signals():
    """A signal that pytest was started to ignore, as under nohup, ends or interrupts processes here."""
    ignored = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def start(*words, fresh=False):
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return start_python("-m", "infocapsgan.train", *words, fresh=fresh, **environment)


def run(*words, seconds=240):
    process = start(*words)
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out


def wait_for_checkpoint(path, process):
    while not checkpoints(path / "checkpoints"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def outcome(path):
    summary = json.loads((path / "summary.json").read_text())
    last = checkpoints(path / "checkpoints")[-1]
    weights = {name: tensor.tolist() for name, tensor in load_file(last / "weights.safetensors").items()}
    return summary["metrics"], summary["steps"], read_metrics(path), weights


@pytest.mark.parametrize(("system", "options"), [("infocapsgan", ["--warm-up", 2]), ("capsnet", [])])
def test_a_killed_and_resumed_run_equals_an_unbroken_one(system, options, tmp_path):
    run(system, *SMALL, *options, "--max-steps", 12, "--out", tmp_path / "unbroken")
    process = start(system, *SMALL, *options, "--max-steps", 12, "--out", tmp_path / "killed")
    wait_for_checkpoint(tmp_path / "killed", process)
    process.kill()
    process.wait()
    run("--resume", tmp_path / "killed")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "unbroken")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_resume_can_lengthen(number, tmp_path):
    process = start("capsnet", *SMALL, "--out", tmp_path / "run")
    wait_for_checkpoint(tmp_path / "run", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    step = int(checkpoints(tmp_path / "run" / "checkpoints")[-1].name.removeprefix("step-"))
    assert f"interrupted after step {step}." in out
    assert f"--resume {tmp_path / 'run'}" in out
    assert not (tmp_path / "run" / "summary.json").exists()
    run("--resume", tmp_path / "run", "--max-steps", step + 3)
    assert outcome(tmp_path / "run")[1] == step + 3


def test_a_run_directory_holds_everything(tmp_path, capsys):
    settings = InfoCapsGAN(
        width=8, batch_size=8, max_steps=3, evaluate_every=2, checkpoint_every=1, out=tmp_path / "run"
    ).settings
    result = train(InfoCapsGAN, settings)
    path, line = tmp_path / "run", result.line
    assert (result.path, result.finished) == (path, True)
    assert line.startswith("unsupervised accuracy 0.")
    assert "(k-means on pixels: 0.7" in line
    assert str(path / "samples") in line
    assert {file.name for file in (path / "samples").iterdir()} == {
        "samples-00000002.png",
        "samples-00000003.png",
    }
    assert {file.name for file in (path / "checkpoints").iterdir()} == {"step-00000002", "step-00000003"}
    assert (path / "curves.png").stat().st_size > 1000
    assert list(path.glob("events.out.tfevents.*"))
    summary = json.loads((path / "summary.json").read_text())
    assert {key: summary[key] for key in ("system", "dataset", "recipe", "seed", "steps")} == {
        "system": "infocapsgan",
        "dataset": "digits",
        "recipe": "tuned",
        "seed": 0,
        "steps": 3,
    }
    assert {"unsupervised_accuracy", "nmi", "ari"} <= set(summary["metrics"])
    assert summary["seconds"] > 0
    assert "torch" in summary["versions"]
    assert [row["step"] for row in read_metrics(path) if row["kind"] == "evaluation"] == [2, 3]


def test_a_loss_that_is_not_finite_stops_at_the_state_before_it(tmp_path, monkeypatch):
    step = CapsNet.step

    def broken(self, images, labels, state):
        named = step(self, images, labels, state)
        if state.step == 2:
            state.update("model", self.model.encoder.conv.bias.sum() * float("nan"))
        return named

    def settings(out, steps):
        return CapsNet(width=8, batch_size=8, max_steps=steps, out=tmp_path / out).settings

    train(CapsNet, settings("short", 2))
    monkeypatch.setattr(CapsNet, "step", broken)
    with pytest.raises(
        NonFiniteLossError, match=r"step 3: the loss of model is nan\. The state after step 2"
    ):
        train(CapsNet, settings("broken", 5))
    (saved,) = checkpoints(tmp_path / "broken" / "checkpoints")
    (wanted,) = checkpoints(tmp_path / "short" / "checkpoints")
    for file in ("weights.safetensors", "training.safetensors"):
        assert (saved / file).read_bytes() == (wanted / file).read_bytes()


def test_a_signal_before_a_bad_loss_is_found_still_saves(tmp_path, monkeypatch):
    step = CapsNet.step

    def broken(self, images, labels, state):
        named = step(self, images, labels, state)
        if state.step == 2:
            state.update("model", self.model.encoder.conv.bias.sum() * float("nan"))
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return named

    monkeypatch.setattr(CapsNet, "step", broken)
    settings = CapsNet(width=8, batch_size=8, max_steps=9, out=tmp_path / "run").settings
    assert "interrupted after step 1." in train(CapsNet, settings).line
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000001"]


def test_validation_keeps_the_weights_with_the_lowest_loss(tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(CapsNet, "validation_loss", lambda self, held_out: next(losses))
    options = {"width": 8, "batch_size": 8, "max_steps": 3, "evaluate_every": 1, "checkpoint_every": 1}
    train(CapsNet, CapsNet(validation=True, out=tmp_path / "run", **options).settings)
    folder = tmp_path / "run" / "checkpoints"
    best = load_file(folder / "best" / "weights.safetensors")
    second, third = (load_file(path / "weights.safetensors") for path in checkpoints(folder))
    assert all(torch.equal(best[name], second[name]) for name in best)
    assert not all(torch.equal(best[name], third[name]) for name in best)
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] != "train"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [row["validation_loss"] for row in rows if row["kind"] == "validation"] == [3, 1, 2]
    assert summary["metrics"]["margin_loss"] == rows[3]["margin_loss"]


def test_images_held_out_are_validated_on_and_not_trained_on(tmp_path, monkeypatch):
    trained_on, validated_on, train_batch = [], [], data.Dataset.train_batch

    def recorded(dataset, chosen, rng):
        trained_on.append(dataset.train_images)
        return train_batch(dataset, chosen, rng)

    def validation_loss(system, held_out):
        validated_on.append(held_out.test_images)
        return 1.0

    monkeypatch.setattr(data.Dataset, "train_batch", recorded)
    monkeypatch.setattr(CapsNet, "validation_loss", validation_loss)
    options = {"width": 8, "batch_size": 8, "max_steps": 1, "validation": True}
    train(CapsNet, CapsNet(out=tmp_path / "run", **options).settings)
    rest, held_out = data.load("digits").hold_out(0.1)
    assert (len(rest.train_images), len(held_out.test_images)) == (1293, 144)
    assert torch.equal(*trained_on, rest.train_images)
    assert torch.equal(*validated_on, held_out.test_images)


def test_an_evaluation_leaves_the_system_in_training_mode(tmp_path, monkeypatch):
    modes, step, evaluate = [], CapsNet.step, CapsNet.evaluate

    def recorded_step(system, *given):
        modes.append(("step", system.training))
        return step(system, *given)

    def recorded_evaluate(system, dataset):
        modes.append(("evaluate", system.training))
        return evaluate(system, dataset)

    monkeypatch.setattr(CapsNet, "step", recorded_step)
    monkeypatch.setattr(CapsNet, "evaluate", recorded_evaluate)
    options = {"width": 8, "batch_size": 8, "max_steps": 2, "evaluate_every": 1}
    train(CapsNet, CapsNet(out=tmp_path / "run", **options).settings)
    assert modes == [("step", True), ("evaluate", False)] * 2


def test_the_last_metrics_are_those_of_all_test_images(tmp_path, monkeypatch):
    measured_on, head, evaluate = [], data.Dataset.head, CapsNet.evaluate

    def recorded(system, dataset):
        measured_on.append(len(dataset.test_images))
        return evaluate(system, dataset)

    monkeypatch.setattr(data.Dataset, "head", lambda dataset, images: head(dataset, min(images, 10)))
    monkeypatch.setattr(CapsNet, "evaluate", recorded)
    monkeypatch.setattr(CapsNet, "validation_loss", lambda system, held_out: 1.0)
    options = {"width": 8, "batch_size": 8, "max_steps": 2, "evaluate_every": 1}
    for validation, wanted in ((False, [10, 360]), (True, [10, 360, 360])):  # once more, of the best weights
        measured_on.clear()
        out = tmp_path / f"validation-{validation}"
        train(CapsNet, CapsNet(out=out, validation=validation, **options).settings)
        assert measured_on == wanted


def test_a_finished_run_taken_up_again_ends_as_before(tmp_path, monkeypatch):
    monkeypatch.setattr(DCGAN, "sample_quality", lambda self, dataset: {"frechet_distance": 7.0})
    options = {"width": 8, "generator_width": 8, "batch_size": 8, "max_steps": 2}
    train(DCGAN, DCGAN(out=tmp_path / "run", **options).settings)
    before = outcome(tmp_path / "run")
    assert before[0]["frechet_distance"] == 7
    (tmp_path / "run" / "summary.json").unlink()  # as if killed just before the end
    train(*parse(["--resume", str(tmp_path / "run")]))
    assert outcome(tmp_path / "run") == before


def test_what_is_measured_of_fewer_steps_goes_when_a_run_is_made_longer(tmp_path, monkeypatch):
    settings = CapsNet(width=8, batch_size=8, max_steps=2, out=tmp_path / "run").settings
    train(CapsNet, settings)
    (tmp_path / "run" / "evaluation.json").write_text("{}")
    resume = ["--resume", str(tmp_path / "run")]
    train(*parse(resume))  # nothing is left to train
    assert (tmp_path / "run" / "evaluation.json").exists()
    monkeypatch.setattr(CapsNet, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(*parse([*resume, "--max-steps", "4"]))
    assert not {"summary.json", "evaluation.json"} & {file.name for file in (tmp_path / "run").iterdir()}


def test_a_run_is_not_resumed_while_it_is_trained(tmp_path):
    process = start("capsnet", *SMALL, "--out", tmp_path / "run")
    wait_for_checkpoint(tmp_path / "run", process)
    second = start("--resume", tmp_path / "run")
    _, err = second.communicate(timeout=120)
    assert second.returncode == 1
    assert f"error: {tmp_path / 'run'} is still being trained, by another process" in err
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def test_what_is_not_as_the_settings_let_one_expect(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(CapsNet, "step", lambda *_: {})
    train(CapsNet, CapsNet(epochs=1, max_steps=500, out=tmp_path / "short").settings)
    assert (
        "warning: --max-steps 500 is not reached: --epochs 1 ends after 11 steps" in capsys.readouterr().err
    )


def test_a_length_that_leaves_nothing_to_train(tmp_path, capsys):
    settings = CapsNet(width=8, batch_size=8, epochs=1, max_steps=2, out=tmp_path / "run").settings
    train(CapsNet, settings)
    config = (tmp_path / "run" / "config.json").read_text()
    resume = ["--resume", str(tmp_path / "run")]
    with pytest.raises(RunError, match="has done 2 steps, .* --epochs 1 and --max-steps 1 ends after 1"):
        train(*parse([*resume, "--max-steps", "1"]))
    assert (tmp_path / "run" / "config.json").read_text() == config
    train(*parse(resume))
    assert "all 2 steps of --epochs 1 and --max-steps 2 are done" in capsys.readouterr().err


def test_a_run_cut_short_before_its_first_validation(tmp_path, monkeypatch):
    step = CapsNet.step

    def interrupted(self, images, labels, state):
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, images, labels, state)

    monkeypatch.setattr(CapsNet, "step", interrupted)
    settings = CapsNet(width=8, batch_size=8, validation=True, out=tmp_path / "run").settings
    result = train(CapsNet, settings)
    assert "interrupted after step 1." in result.line
    assert not result.finished
    assert train(*parse(["--resume", str(tmp_path / "run"), "--max-steps", "1"]))
    assert outcome(tmp_path / "run")[1] == 1


@pytest.mark.slow
def test_a_compiled_run_resumes_to_the_same_weights_under_the_same_names(tmp_path, monkeypatch):
    compiled = []

    def compile_networks(system):
        compiled.append(system)
        compile_with(system, "aot_eager")

    compile_with = System.compile_networks
    monkeypatch.setattr(System, "compile_networks", compile_networks)
    options = {"width": 8, "batch_size": 8, "evaluate_every": 1, "compile": True, "validation": True}
    for name, steps in (("unbroken", 3), ("resumed", 2)):
        train(CapsNet, CapsNet(out=tmp_path / name, max_steps=steps, **options).settings)
    train(*parse(["--resume", str(tmp_path / "resumed"), "--max-steps", "3"]))
    assert len(compiled) == 3
    names = sorted(CapsNet(width=8).state_dict())
    for name in ("best", "step-00000003"):
        one, two = (
            (tmp_path / run / "checkpoints" / name / "weights.safetensors") for run in ("unbroken", "resumed")
        )
        assert one.read_bytes() == two.read_bytes()
        assert sorted(load_file(one)) == names


def test_weights_of_a_run_load_into_an_ordinary_module(tmp_path):
    options = {"width": 8, "batch_size": 8, "max_steps": 1}
    train(CapsNet, CapsNet(out=tmp_path / "run", **options).settings)
    (saved,) = checkpoints(tmp_path / "run" / "checkpoints")
    system = CapsNet(width=8)
    system.load_state_dict(load_file(saved / "weights.safetensors"))
    capsules, rebuilt = system.model(torch.rand(2, 1, 28, 28))
    assert (capsules.shape, rebuilt.shape) == ((2, 10, 16), (2, 1, 28, 28))


@pytest.mark.parametrize("system", ["capsnet", "infogan"])
def test_ten_steps_on_cifar10(system, tmp_path, monkeypatch):
    sample = Path(os.environ.get("INFOCAPSGAN_DATA", "")) / "cifar-10-sample"
    if not sample.is_dir():
        pytest.skip("$INFOCAPSGAN_DATA with cifar-10-sample/ is not there")
    (tmp_path / "cifar-10-batches-py").symlink_to(sample.resolve())
    # of all images it takes longer than the run
    monkeypatch.setattr(
        "infocapsgan.systems.class_code.kmeans_accuracy",
        lambda dataset, classes: kmeans_accuracy(dataset.head(100), classes),
    )
    settings = SYSTEMS[system](
        dataset="cifar10", data_dir=tmp_path, width=8, batch_size=8, max_steps=10, out=tmp_path / "run"
    ).settings
    train(SYSTEMS[system], settings)
    metrics, steps, rows, _ = outcome(tmp_path / "run")
    assert steps == 10
    assert all(0 <= value <= 1 for name, value in metrics.items() if "accuracy" in name)
    assert rows[0]["step"] == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "--device: got cuda, but torch finds no GPU"),
        ({"device": "cpu", "impl": "cuda"}, "--impl cuda: impl='cuda' "),
    ],
)
def test_what_cannot_serve_is_found_before_there_is_a_run(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    settings = CapsNet(width=8, batch_size=8, max_steps=1, out=tmp_path / "run", **options).settings
    with pytest.raises(RunError, match=message):
        train(CapsNet, settings)
    assert not (tmp_path / "run").exists()


def test_steps_that_end_before_the_generator_comes_in(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("infocapsgan.systems.class_code.kmeans_accuracy", lambda *_: 0.8)
    for steps, warned in ((1, True), (2, False)):
        options = {"width": 8, "batch_size": 8, "warm_up": 1, "max_steps": steps}
        settings = InfoCapsGAN(out=tmp_path / str(steps), **options).settings
        train(InfoCapsGAN, settings)
        assert ("warning: the generator is not trained" in capsys.readouterr().err) == warned


def test_errors_are_one_line(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    process = start("--out", tmp_path / "full", fresh=True)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.strip().splitlines()[-1].startswith("error: --out: ")
    assert "Traceback" not in err


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_is_trained_in_the_precision_asked_for(precision, tmp_path, monkeypatch):
    step, found = CapsNet.step, []

    def noted(self, images, labels, state):
        found.append(state.precision)
        return step(self, images, labels, state)

    monkeypatch.setattr(CapsNet, "step", noted)
    options = {"width": 8, "batch_size": 8, "max_steps": 1, "precision": precision}
    train(CapsNet, CapsNet(out=tmp_path / "run", **options).settings)
    assert found == [precision]


def test_the_number_of_epochs_and_how_often_something_is_logged_and_saved(tmp_path):
    options = {"width": 8, "batch_size": 100, "epochs": 1}
    often = {"log_every": 3, "evaluate_every": 10, "checkpoint_every": 6}
    train(CapsNet, CapsNet(out=tmp_path / "run", **options, **often).settings)
    _, steps, rows, _ = outcome(tmp_path / "run")
    assert steps == 14  # of 1437 images
    assert [row["step"] for row in rows if row["kind"] == "train"] == [3, 6, 9, 12, 14]
    assert [row["step"] for row in rows if row["kind"] == "evaluation"] == [10, 14]
    saved = checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in saved] == ["step-00000012", "step-00000014"]


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_capsnet_passes_095_on_digits(tmp_path):
    run("capsnet", "--out", tmp_path / "run", seconds=700)
    assert outcome(tmp_path / "run")[0]["accuracy"] > 0.95


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_infocapsgan_passes_kmeans_on_digits(tmp_path):
    run("--out", tmp_path / "run", seconds=1700)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (kmeans,) = summary["baselines"]["unsupervised_accuracy"].values()
    assert summary["metrics"]["unsupervised_accuracy"] > kmeans


@pytest.mark.parametrize(("impl", "wanted"), [("auto", "reference"), ("cpu", "cpu")])
def test_impl_auto_leaves_the_default_of_the_process(impl, wanted, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(loop.Trainer, "fit", lambda trainer: asked.append(requested("auto", "cpu")))
    settings = CapsNet(width=8, device="cpu", impl=impl, out=tmp_path / "run").settings
    with capsops.use_impl("reference"):  # as CAPSOPS_IMPL does
        train(CapsNet, settings)
    assert asked == [wanted]


def small(out, **options):
    return CapsNet(width=8, batch_size=8, **({"max_steps": 2} | options), out=out).settings


@pytest.mark.parametrize(("steps", "said"), [(59, False), (60, True)])
def test_how_long_it_will_take_is_said_after_the_first_steps(steps, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(CapsNet, "step", lambda *_: {})
    train(CapsNet, small(tmp_path / "run", max_steps=steps))
    assert (f"{steps} steps will take about 00:0" in capsys.readouterr().err) == said


def test_that_time_is_of_the_later_first_steps(tmp_path, monkeypatch, capsys):
    """The first ones compile or choose algorithms."""
    clock = iter(range(10_000))
    monkeypatch.setattr(CapsNet, "step", lambda *_: {})
    monkeypatch.setattr(loop, "PACE_TO", 25)
    monkeypatch.setattr(loop.time, "monotonic", lambda: 60 * next(clock))
    train(CapsNet, small(tmp_path / "run", max_steps=100))
    assert "100 steps will take about 05:00" in capsys.readouterr().err  # 20 steps in the minute between


def test_a_signal_is_noted_once_and_what_it_did_before_comes_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    for number in SIGNALS:
        with Interruption() as interruption:
            assert not interruption.came
            os.kill(os.getpid(), number)
            assert interruption.came
            assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(ZeroDivisionError), Interruption():
        1 / 0  # noqa: B018
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_hangup_that_is_ignored_stays_so():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interruption.came
    finally:
        signal.signal(signal.SIGHUP, before)


def test_training_in_another_thread(tmp_path):
    with ThreadPoolExecutor() as pool:
        assert pool.submit(train, CapsNet, small(tmp_path / "run")).result().finished


def no_room(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("method", ["draw", "draw_curves"])
def test_no_room_for_pictures(method, tmp_path, monkeypatch):
    train(CapsNet, small(tmp_path / "unbroken", max_steps=4, evaluate_every=2))
    settings = small(tmp_path / "run", max_steps=4, evaluate_every=2, checkpoint_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, method, no_room)
        with pytest.raises(RunError, match=f"{tmp_path / 'run'} cannot be written: No space left on device"):
            train(CapsNet, settings)
    train(*parse(["--resume", str(tmp_path / "run")]))
    assert outcome(tmp_path / "run")[3] == outcome(tmp_path / "unbroken")[3]


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "summary.json"])
def test_no_room_for_a_file(name, tmp_path, monkeypatch):
    fsync = os.fsync

    def full(descriptor):
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            no_room()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=f"{tmp_path / 'run'}.* cannot be written: No space left on device"):
        train(CapsNet, small(tmp_path / "run"))


def test_a_run_directory_removed_under_training(tmp_path, monkeypatch):
    step = CapsNet.step

    def removing(system, images, labels, state):
        if state.step == 1:
            shutil.rmtree(tmp_path / "run")
        return step(system, images, labels, state)

    monkeypatch.setattr(CapsNet, "step", removing)
    with pytest.raises(RunError, match=f"{tmp_path / 'run'}.* cannot be written"):
        train(CapsNet, small(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_headline_that_was_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(CapsNet, "evaluate", lambda *_: {"margin_loss": 0.5})
    monkeypatch.setattr(CapsNet, "baselines", lambda *_: {})
    line = train(CapsNet, small(tmp_path / "run")).line
    assert line.startswith("finished after 2 steps in ")
    assert str(tmp_path / "run" / "samples") in line
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["metrics"], summary["baselines"]) == ({"margin_loss": 0.5}, {})


def test_the_state_of_the_gradient_scaler_is_taken_up(tmp_path, monkeypatch):
    scaler = functools.partial(torch.amp.GradScaler, growth_interval=2)
    monkeypatch.setattr("torch.amp.GradScaler", scaler)
    for name, steps in (("unbroken", 5), ("resumed", 3)):
        train(CapsNet, small(tmp_path / name, max_steps=steps, precision="fp16"))
    train(*parse(["--resume", str(tmp_path / "resumed"), "--max-steps", "5"]))
    (unbroken,), resumed = (checkpoints(tmp_path / name / "checkpoints") for name in ("unbroken", "resumed"))
    states = [json.loads((path / "state.json").read_text())["scalers"] for path in (unbroken, resumed[-1])]
    assert states[0] == states[1]
    assert states[0]["model"]["scale"] == 4 * 65536
    assert outcome(tmp_path / "resumed")[3] == outcome(tmp_path / "unbroken")[3]


def test_the_seconds_of_the_first_part_count(tmp_path):
    train(CapsNet, small(tmp_path / "run"))
    (saved,) = checkpoints(tmp_path / "run" / "checkpoints")
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(state | {"seconds": 1000}))
    train(*parse(["--resume", str(tmp_path / "run"), "--max-steps", "3"]))
    last = checkpoint.load(checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert 1000 < last.numbers["seconds"] < 1100
    assert 1000 < json.loads((tmp_path / "run" / "summary.json").read_text())["seconds"] < 1100


def test_the_command_names_what_is_wrong_and_fails(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["train", "capsnet", "--out", str(tmp_path / "file" / "run")])
    with pytest.raises(
        SystemExit, match=f"error: --out: {tmp_path}/file.* cannot be written: Not a directory"
    ):
        main()
