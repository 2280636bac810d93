"""The examples of the README and of the pages in docs run, one after another, as a reader would type them."""

import re
from pathlib import Path

import pytest

from tests.peers.table import PEERS

README = Path(__file__).parents[1] / "README.md"
DOCS = sorted((README.parent / "docs").glob("**/*.md"))
REPLACE = README.parent / "docs" / "replace_your_routing_layer.md"


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_examples(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks, f"{page.name} has no examples"
    assert "@@" not in text
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name}, example {number + 1}", "exec"), names)


def test_the_page_on_other_layers_names_all_that_are_tested() -> None:
    text = REPLACE.read_text(encoding="utf-8")
    for peer in PEERS:
        assert f"| {peer.repository}: " in text
        for file_or_commit in re.findall(r"\b[0-9a-f]{7}\b", peer.source):
            assert file_or_commit in text, f"{peer}: commit {file_or_commit}"


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "pip install -e '.[test]' && pytest -n 2" in README.read_text()
    ci = (README.parent / ".ci" / "run").read_text()
    assert "-e '.[test]'\n" in ci
    assert ci.endswith("\npytest -n 2\n")


def test_files_named_in_the_readme_exist() -> None:
    text = README.read_text()
    for name in re.findall(r"`((?:benchmarks|results|capsops|infocapsgan)/[\w/.-]+)`", text) + re.findall(
        r"\]\(([\w/.-]+)\)", text
    ):
        assert (README.parent / name).exists(), f"README.md names {name}, which does not exist"
