"""What the package's layout promises; see CONTRIBUTING.md."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

import infocapsgan
from infocapsgan import data, plotting
from infocapsgan.metrics import GROUPS
from infocapsgan.systems import SYSTEMS

PACKAGE = Path(infocapsgan.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def test_the_package_stays_slim():
    assert sum(len(path.read_text().splitlines()) for path in FILES) <= 7130


def test_functions_of_the_engine_fit_a_screen():
    for path in (PACKAGE / "engine").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


def test_nobody_asks_for_the_class_of_a_system():
    classes = {system.__name__ for system in SYSTEMS.values()} | {
        "GAN",
        "LatentGAN",
        "ClassCodeGAN",
        "Supervised",
    }
    for folder in ("engine", "metrics", "plotting", "."):
        for path in (PACKAGE / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                    "isinstance",
                    "issubclass",
                ):
                    assert not {getattr(n, "id", "") for n in ast.walk(node.args[1])} & classes, path


@pytest.mark.parametrize(
    ("package", "text", "registered"),
    [
        (
            "systems",
            "from infocapsgan.systems import DCGAN\nclass Mine(DCGAN, name='mine'):\n    'Mine: a test.'\n",
            lambda: SYSTEMS,
        ),
        (
            "metrics",
            "from infocapsgan.metrics import register\n@register('mine', lambda system, dataset: '')\n"
            "def mine(system, dataset, samples):\n    return {}, {}\n",
            lambda: GROUPS,
        ),
        (
            "data",
            "from infocapsgan.data import ImageShape\nfrom infocapsgan.data.registry import register\n"
            "@register('mine', ImageShape(1, 28, 10))\ndef load(data_dir):\n    return None\n",
            lambda: data.registry._SETS,
        ),
    ],
)
def test_a_new_one_is_one_file_that_registers_itself(package, text, registered, tmp_path, monkeypatch):
    (tmp_path / "mine_of_a_test.py").write_text(text)
    module = importlib.import_module(f"infocapsgan.{package}")
    monkeypatch.setattr(module, "__path__", [*module.__path__, str(tmp_path)])
    try:
        for found in module.pkgutil.iter_modules(module.__path__):
            importlib.import_module(f"infocapsgan.{package}.{found.name}")
        assert "mine" in registered()
    finally:
        registered().pop("mine", None)
        sys.modules.pop(f"infocapsgan.{package}.mine_of_a_test", None)


def test_a_new_kind_of_picture_is_a_module_with_a_function_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "mine_of_a_test.py").write_text("def mine_of_a_test(run):\n    'Mine.'\n")
    monkeypatch.setattr(plotting, "__path__", [*plotting.__path__, str(tmp_path)])
    assert plotting.kinds()["mine_of_a_test"].__doc__ == "Mine."
    assert {"grid", "curves", "animate"} < plotting.kinds().keys()
    sys.modules.pop("infocapsgan.plotting.mine_of_a_test")
