"""What every system must do."""

import dataclasses

import pytest
import torch

from infocapsgan import checkpoint, data
from infocapsgan.draw import Draw
from infocapsgan.systems import SYSTEMS
from infocapsgan.training import Training

SMALL = {name: {"width": 8, "batch_size": 16} for name in SYSTEMS}
SMALL["infocapsgan"]["warm_up"] = 0
for name in ("capsulegan", "dcgan"):
    SMALL[name]["generator_width"] = 8


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def train(system, dataset, steps, precision="fp32"):
    training = Training(system.optimizers, Draw(0), precision=precision)
    images, labels = dataset.train_images[:16], dataset.train_labels[:16]
    rows = []
    for _ in range(steps):
        rows.append({name: value.item() for name, value in system.step(images, labels, training).items()})
        training.step += 1
    return rows


@pytest.mark.parametrize("recipe", ["tuned", "published"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_twenty_steps_evaluation_and_pictures(name, recipe, digits):
    torch.manual_seed(0)
    system = SYSTEMS[name](recipe=recipe, **SMALL[name])
    before = {key: value.clone() for key, value in system.named_parameters()}
    rows = train(system, digits, 20)
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in rows)
    assert all(not torch.equal(before[key], value) for key, value in system.named_parameters())
    system.eval()
    with torch.no_grad():
        metrics = system.evaluate(digits.head(50))
        assert metrics == system.evaluate(digits.head(50))
        pictures = system.pictures(digits)
    assert 0 <= metrics[system.headline] <= 1
    assert pictures
    for images, columns in pictures.values():
        assert images.shape[1:] == (1, 28, 28)
        assert images.shape[0] % columns == 0
        assert 0 <= images.min() <= images.max() <= 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_low_precision(name, precision, digits):
    torch.manual_seed(0)
    rows = train(SYSTEMS[name](precision=precision, **SMALL[name]), digits, 3, precision)
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in rows)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_restored_state_goes_on_to_the_same_numbers(name, digits, tmp_path):
    torch.manual_seed(0)
    system = SYSTEMS[name](**SMALL[name])
    training = Training(system.optimizers, Draw(0))
    images, labels = digits.train_images[:16], digits.train_labels[:16]
    for _ in range(3):
        system.step(images, labels, training)
    training.step = 3
    path = checkpoint.save(tmp_path, checkpoint.capture(system, training), seconds=1.5)
    wanted = system.step(images, labels, training)

    torch.manual_seed(1)
    other = SYSTEMS[name](**SMALL[name])
    resumed = Training(other.optimizers, Draw(1))
    checkpoint.restore(checkpoint.load(path), other, resumed)
    assert resumed.step == 3
    found = other.step(images, labels, resumed)
    assert {key: value.item() for key, value in found.items()} == {
        key: value.item() for key, value in wanted.items()
    }
    assert all(torch.equal(a, b) for a, b in zip(system.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", SYSTEMS)
def test_settings_survive_json(name, tmp_path):
    settings = dataclasses.replace(SYSTEMS[name].defaults("published", "mnist"), out=tmp_path)
    assert SYSTEMS[name].Settings.from_json(settings.to_json()) == settings


def test_settings_and_options_exclude_one_another():
    for system in SYSTEMS.values():
        with pytest.raises(ValueError, match="settings and options exclude one another"):
            system(system.defaults(), width=16)
