import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

from infocapsgan import data
from infocapsgan.engine.command_line import parse
from infocapsgan.engine.run_directory import Config, write_config
from infocapsgan.engine.settings import option_name
from infocapsgan.systems import SYSTEMS, CapsNet, InfoCapsGAN


def fails(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        parse(words)
    assert caught.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_no_word_at_all():
    system, settings = parse([])
    assert system is InfoCapsGAN
    assert settings == InfoCapsGAN.defaults("tuned", "digits")


def test_options_without_a_system():
    system, settings = parse(["--seed", "3"])
    assert (system, settings.seed) == (InfoCapsGAN, 3)


def test_recipe_and_data_set_choose_the_defaults():
    assert parse(["--recipe=published"])[1] == InfoCapsGAN.defaults("published", "digits")
    system, settings = parse(["capsnet", "--dataset", "mnist", "--epochs", "2", "--leaky"])
    assert system is CapsNet
    assert settings == dataclasses.replace(CapsNet.defaults("tuned", "mnist"), epochs=2, leaky=True)
    assert (settings.width, settings.stem) == (64, "stacked")


@pytest.mark.parametrize("name", SYSTEMS)
def test_help_lists_every_option_with_its_default(name, capsys):
    with pytest.raises(SystemExit) as caught:
        parse([name, "--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(SYSTEMS[name].Settings):
        assert option_name(field.name) in shown
    assert shown.count("(default: ") == len(dataclasses.fields(SYSTEMS[name].Settings))
    for other in SYSTEMS:
        assert other in shown


def test_no_data_are_loaded_before_the_options_are_checked(capsys, monkeypatch):
    monkeypatch.setattr(data, "load", None)
    assert "Unrecognized options: --bach-size" in fails(capsys, "--bach-size", "3")
    assert "--batch-size: got 0, takes at least 1" in fails(capsys, "--batch-size", "0")
    assert "--width: got 20, takes a multiple of 8" in fails(capsys, "--width", "20")
    assert "--rate-decay: got 1.5, takes 0 to 1" in fails(capsys, "capsnet", "--rate-decay", "1.5")
    words = ("dcgan", "--compile", "--adversarial-loss", "wasserstein")
    assert "--compile: cannot be combined with --adversarial-loss wasserstein" in fails(capsys, *words)
    assert "--test-pairs: got 0" in fails(capsys, "capsnet", "--test-pairs", "0")
    assert "letters" in fails(capsys, "--dataset", "letters")
    assert "guessed" in fails(capsys, "--recipe", "guessed")
    assert "SYSTEM: got resnet, takes one of capsnet" in fails(capsys, "resnet")


def test_values_are_checked_in_python_too():
    with pytest.raises(ValueError, match="--epochs: got 0, takes at least 1"):
        CapsNet(epochs=0)
    with pytest.raises(ValueError, match="--decoder: got 'none', takes one of fc, deconv"):
        CapsNet(decoder="none")


@pytest.fixture
def run(tmp_path):
    record(tmp_path, CapsNet.defaults("published", "mnist"))
    return tmp_path


def record(path, settings):
    shape = {"channels": 1, "size": 28, "classes": 10}
    write_config(path, Config("capsnet", settings.to_json(), shape, list("0123456789"), None))


def test_resume_takes_the_settings_of_the_run(run):
    system, settings = parse(["--resume", str(run), "--max-steps", "7", "--epochs=50"])
    assert system is CapsNet
    wanted = dataclasses.replace(CapsNet.defaults("published", "mnist"), resume=run, max_steps=7, epochs=50)
    assert settings == wanted
    assert parse(["capsnet", f"--resume={run}"])[1] == dataclasses.replace(wanted, max_steps=None, epochs=30)


def test_epochs_alone_lift_the_recorded_number_of_steps(run):
    record(run, CapsNet(max_steps=7, epochs=20).settings)
    for words, epochs, steps in (
        ([], 20, 7),
        (["--epochs", "50"], 50, None),
        (["--max-steps", "9"], 20, 9),
        (["--epochs", "50", "--max-steps", "9"], 50, 9),
    ):
        found = parse(["--resume", str(run), *words])[1]
        assert (found.epochs, found.max_steps) == (epochs, steps)


def test_nothing_else_can_be_given_beside_resume(run, capsys):
    assert "--seed 3: cannot be given beside --resume" in fails(capsys, "--resume", str(run), "--seed", "3")
    assert "only --epochs, --max-steps and --data-dir can" in fails(capsys, f"--resume={run}", "--out", "x")
    assert "is one of capsnet" in fails(capsys, "infocapsgan", "--resume", str(run))
    assert "--epochs: got 0, takes at least 1" in fails(capsys, "--resume", str(run), "--epochs", "0")


def test_resume_of_what_is_no_run(tmp_path, capsys):
    assert "is not a run directory" in fails(capsys, "--resume", str(tmp_path / "nowhere"))


def test_resume_of_a_run_of_another_version(run, capsys):
    config = json.loads((run / "config.json").read_text())
    fewer = {name: value for name, value in config["settings"].items() if name != "out"}
    for changed, message in (
        ({"system": "resnet"}, "holds a run of 'resnet', which is none of capsnet"),
        (
            {"settings": config["settings"] | {"depth": 3}},
            "by another version of infocapsgan: --depth is unknown",
        ),
        ({"settings": fewer}, "by another version of infocapsgan: --out is missing"),
    ):
        (run / "config.json").write_text(json.dumps(config | changed))
        assert re.search(f"--resume: .*{message}", fails(capsys, "--resume", str(run)))


def test_a_relative_data_dir_becomes_absolute(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = parse(["--out", "somewhere", "--data-dir", "data"])[1]
    assert (settings.out, settings.data_dir) == (Path("somewhere"), tmp_path / "data")
    assert parse(["--data-dir", "/data"])[1].data_dir == Path("/data")
    assert parse(["--resume", str(run), "--data-dir", "moved"])[1].data_dir == tmp_path / "moved"
    assert parse(["--resume", str(run)])[1].data_dir is None


def help_headings(capsys, *words):
    """The options under each heading of --help."""
    with pytest.raises(SystemExit):
        parse([*words, "--help"])
    headings = {}
    for line in capsys.readouterr().out.splitlines():
        text = line.strip(" ╭╮│─")
        if re.fullmatch("([A-Za-z ]+ )?options", text):
            options = headings[text] = []
        elif option := re.match("--[a-z-]+[a-z]", text):
            options.append(option[0])
    return headings


def test_help_groups_the_options(capsys):
    headings = help_headings(capsys, "infogan")
    assert list(headings) == [
        "options",
        "training options",
        "data options",
        "run directory options",
        "machine options",
        "GAN options",
        "ClassCode options",
        "InfoGAN options",
    ]
    assert headings["machine options"] == ["--device", "--impl", "--precision", "--compile"]
    # InfoGAN overrides the default of batch_size.
    assert {"--epochs", "--batch-size", "--seed"} <= set(headings["training options"])
    assert {"--out", "--resume", "--log-every"} <= set(headings["run directory options"])
    assert "--adversarial-loss" in headings["GAN options"]
    assert "--noise-dim" in headings["InfoGAN options"]
    assert list(help_headings(capsys, "capsulegan"))[-3:] == [
        "GAN options",
        "DCGAN options",
        "CapsuleGAN options",
    ]
    assert list(help_headings(capsys, "capsnet"))[-2:] == ["Supervised options", "CapsNet options"]


def test_help_without_a_system_says_what_each_is_and_how_folders_are_laid_out(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    for name in SYSTEMS:
        assert len(re.findall(rf"^  {name} +[\w-].*\.$", shown, re.MULTILINE)) == 1
    assert "capsnet      supervised capsule classifier with reconstruction (Sabour, Frosst, Hinton" in shown
    assert re.search("cats/a.png .* a folder for each class\n", shown)
    assert "train/… test/…" in shown
    assert "machine options" in shown
    assert shown.startswith("usage: python -m infocapsgan.train [-h]")


def test_help_shows_the_text_of_the_most_special_class(capsys):
    with pytest.raises(SystemExit):
        parse(["capsnet", "--help"])
    assert "multi-mnist overlays pairs" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_the_name_of_the_program_in_messages(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["infocapsgan train"])
    assert "infocapsgan train: error: SYSTEM: got resnet" in fails(capsys, "resnet")
    monkeypatch.setattr(sys, "argv", ["/somewhere/infocapsgan/train.py"])
    assert "python -m infocapsgan.train: error: SYSTEM: got resnet" in fails(capsys, "resnet")
