from pathlib import Path
from typing import Any

import pytest

from infocapsgan.engine.settings import Settings, mismatch
from infocapsgan.systems import CapsNet

NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 2.5}, r"--batch-size: got 2\.5, takes a whole number, at least 1"),
        ({"batch_size": True}, "--batch-size: got True, takes a whole number"),
        ({"max_steps": 2.0}, r"--max-steps: got 2\.0, takes a whole number"),
        ({"max_steps": 0}, "--max-steps: got 0, takes at least 1$"),
        ({"compile": "yes"}, "--compile: got 'yes', takes true or false"),
        ({"compile": 1}, "--compile: got 1, takes true or false"),
        ({"width": None}, "--width: got None, takes a whole number, at least 8"),
        ({"seed": 2**64}, "--seed: got 18446744073709551616, takes 0 to"),
        ({"device": []}, r"--device: got \[\], takes one of auto, cpu, cuda"),
        ({"data_dir": 3}, "--data-dir: got 3, takes a path"),
        ({"learning_rate": None}, "--learning-rate: got None, takes a number, at least 0"),
        ({"learning_rate": NAN}, "--learning-rate: got nan, takes a number"),
        ({"learning_rate": INFINITE}, "--learning-rate: got inf, takes a number"),
        ({"learning_rate": 10**400}, "--learning-rate: got 1000.*, takes a number"),
        ({"learning_rate": "1"}, "--learning-rate: got '1', takes a number"),
        ({"learning_rate": True}, "--learning-rate: got True, takes a number"),
        ({"rate_decay": 1.5}, "--rate-decay: got 1.5, takes 0 to 1"),
        ({"depth": 3}, "--depth is unknown"),
        ({"epochs": None}, "--batch-size, --epochs: take a number, but for --dataset folder"),
    ],
)
def test_values_that_are_refused(values, message):
    recorded = CapsNet.defaults().to_json()
    with pytest.raises(ValueError, match=message):
        CapsNet.Settings.from_json(recorded | values)
    if "depth" not in values:
        with pytest.raises(ValueError, match=message):
            CapsNet(**values)


def test_an_option_that_is_missing():
    values = CapsNet.defaults().to_json()
    del values["out"]
    with pytest.raises(ValueError, match="--out is missing"):
        CapsNet.Settings.from_json(values)


def test_a_whole_number_serves_as_a_number_and_stays_one():
    assert repr(CapsNet(learning_rate=1).settings.learning_rate) == "1"


def test_settings_are_read_as_they_were_written(tmp_path):
    for settings in (
        CapsNet(data_dir=tmp_path, out=Path("run"), max_steps=3).settings,
        Settings(dataset="folder", image_size=64, epochs=None, batch_size=None),
    ):
        assert type(settings).from_json(settings.to_json()) == settings


def test_paths_may_be_strings_and_that_of_the_data_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = Settings(data_dir="data", out="run")
    assert (settings.data_dir, settings.out) == (tmp_path / "data", Path("run"))
    assert settings.to_json()["data_dir"] == str(tmp_path / "data")


def test_the_size_of_the_images_of_a_folder():
    for size in (28, 64, 128):
        assert Settings(dataset="folder", image_size=size).image_size == size
    for size in (24, 30, 132):
        with pytest.raises(ValueError, match=f"--image-size: got {size}, takes "):
            Settings(dataset="folder", image_size=size)
    with pytest.raises(ValueError, match="--image-size: .* with --dataset folder only"):
        Settings(image_size=32)


def test_a_folder_leaves_batch_size_and_epochs_to_its_images():
    settings = CapsNet.defaults("tuned", "folder")
    assert (settings.batch_size, settings.epochs) == (None, None)


def test_types_with_parts():
    assert not mismatch({"a": [1, 2]}, dict[str, list[int]])
    assert not mismatch({"a": None}, dict[str, Any])
    assert mismatch({"a": [1, "2"]}, dict[str, list[int]]) == "a dict"
    assert mismatch([], dict[str, int]) == "a dict"
    assert mismatch({}, list[int]) == "a list"
