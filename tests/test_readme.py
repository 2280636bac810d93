"""The README's examples run, one after another, as a reader would type them."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    assert "@@" not in README.read_text()
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, example {number + 1}", "exec"), names)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "pip install -e '.[test]' && pytest" in README.read_text()
    ci = (README.parent / ".ci" / "run").read_text()
    assert "-e '.[test]'\n" in ci
    assert ci.endswith("\npytest\n")


def test_files_named_in_the_readme_exist() -> None:
    text = README.read_text()
    for name in re.findall(r"`((?:benchmarks|results|capsops|infocapsgan)/[\w/.-]+)`", text) + re.findall(
        r"\]\(([\w/.-]+)\)", text
    ):
        assert (README.parent / name).exists(), f"README.md names {name}, which does not exist"
