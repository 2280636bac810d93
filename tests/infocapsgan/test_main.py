import contextlib
import importlib
import re
import runpy
import sys
from types import SimpleNamespace

import pytest

import capsops
from infocapsgan.__main__ import COMMANDS, main
from tests.processes import ROOT


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["infocapsgan", *words])
    main()


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_help_lists_every_command_with_a_sentence(words, monkeypatch, capsys):
    with contextlib.suppress(SystemExit):
        call(monkeypatch, *words)
    shown = capsys.readouterr().out
    assert list(COMMANDS) == ["train", "evaluate", "visualize", "sweep", "predict", "export"]
    for name, sentence in COMMANDS.items():
        assert re.search(rf"^  {name} +{sentence}$", shown, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("words", [[], ["--help"], ["capsnet", "--seed", "3", "--version"]])
def test_a_command_gets_the_words_after_its_name(command, words, monkeypatch):
    seen = []
    module = SimpleNamespace(main=lambda: seen.append(sys.argv))
    monkeypatch.setitem(sys.modules, f"infocapsgan.{command}", module)
    call(monkeypatch, command, *words)
    assert seen == [[f"infocapsgan {command}", *words]]


def test_an_unknown_command(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, "fly", "--high")
    assert caught.value.code == 2
    assert "COMMAND: got fly, takes one of train, evaluate, visualize, sweep," in capsys.readouterr().err


def test_the_version(monkeypatch, capsys):
    call(monkeypatch, "--version")
    assert capsys.readouterr().out == f"infocapsgan {capsops.__version__}\n"


def test_python_m_reaches_the_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["infocapsgan", "train", "resnet"])
    monkeypatch.delitem(sys.modules, "infocapsgan.__main__")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("infocapsgan", run_name="__main__")
    assert caught.value.code == 2
    assert "infocapsgan train: error: SYSTEM: got resnet" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "visualize", "predict", "export"])
def test_messages_name_the_command_as_it_was_called(command, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, command)
    assert (
        f"infocapsgan {command}: error: the following arguments are required: RUN" in capsys.readouterr().err
    )
    monkeypatch.setattr(sys, "argv", ["anything"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"infocapsgan.{command}").main()
    assert f"python -m infocapsgan.{command}: error: the following" in capsys.readouterr().err


def test_the_console_script_is_main():
    project = (ROOT / "pyproject.toml").read_text()
    assert '[project.scripts]\ninfocapsgan = "infocapsgan.__main__:main"' in project
