"""What every system must do."""

import copy
import dataclasses
import itertools
import os
import pickle

import pytest
import torch
from PIL import Image

from infocapsgan import data
from infocapsgan.data import folder
from infocapsgan.engine import checkpoint
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.train_state import DTYPES, TrainState
from infocapsgan.systems import SYSTEMS
from infocapsgan.systems.gan import GAN
from infocapsgan.systems.supervised import Supervised
from tests.tiers import fast_only, slow

SMALL = {name: {"width": 8, "batch_size": 16} for name in SYSTEMS}
SMALL["infocapsgan"]["warm_up"] = SMALL["infogan"]["warm_up"] = 0
for name in ("capsulegan", "dcgan"):
    SMALL[name]["generator_width"] = 8


# With everything on that has a state of its own or takes random numbers.
FULL = {name: {"precision": "fp16"} for name in SYSTEMS}
for name, system in SYSTEMS.items():
    if issubclass(system, GAN):
        FULL[name] |= {"spectral_norm": True, "ema": 0.9}
FULL["encoder"] |= {"batch_norm": True}
FULL["infocapsgan"] |= {"batch_norm": True, "smoothness_weight": 1.0}
FULL["infogan"] |= {"warm_up": 2, "smoothness_after": 1}
FULL["capsnet"] |= {"encoder_batch_norm": True, "decoder_batch_norm": True, "deform": 1.0, "flip": True}
FULL["capsnet"] |= {"brightness": 0.1, "contrast": 0.1, "reconstruction_schedule": "early"}


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def mnist():
    if not os.path.isdir(os.path.join(os.environ.get("INFOCAPSGAN_DATA", ""), "mnist")):
        pytest.skip("$INFOCAPSGAN_DATA with mnist/ is not there")
    return data.load("mnist").head(100)


def train(system, dataset, steps, precision="fp32"):
    state = TrainState(system.optimizers, ShardedGenerator(0), precision=precision)
    images, labels = dataset.train_images[:16], dataset.train_labels[:16]
    rows = []
    for _ in range(steps):
        rows.append({name: value.item() for name, value in system.step(images, labels, state).items()})
        state.step += 1
    return rows


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        slow(name, recipe)
        if recipe == "published" and name not in ("capsnet", "infocapsgan")
        else (name, recipe)
        for name, recipe in itertools.product(SYSTEMS, ["tuned", "published"])
    ],
)
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


@pytest.mark.parametrize(
    ("name", "precision"),
    fast_only(
        [("capsnet", "bf16"), *((name, "fp16") for name in ("capsnet", "dcgan", "encoder", "infogan"))],
        itertools.product(SYSTEMS, ["bf16", "fp16"]),
    ),
)
def test_twenty_steps_in_low_precision(name, precision, digits):
    system, dtypes = SYSTEMS[name](precision=precision, **SMALL[name]), set()
    for module in system.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, __, output: dtypes.add(output.dtype))
    finite_and_changed(system, digits)
    assert dtypes == {DTYPES[precision]}


@pytest.mark.parametrize("precision", fast_only(["fp32"], ["fp32", "bf16", "fp16"]))
@pytest.mark.parametrize("name", SYSTEMS)
def test_twenty_steps_on_mnist(name, precision, mnist):
    finite_and_changed(SYSTEMS[name](dataset="mnist", precision=precision, **SMALL[name]), mnist)


def finite_and_changed(system, dataset):
    before = {key: value.clone() for key, value in system.named_parameters()}
    rows = train(system, dataset, 20, system.settings.precision)
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in rows)
    now = dict(system.named_parameters())
    assert all(torch.isfinite(value).all() for value in now.values())
    assert all(not torch.equal(before[key], value) for key, value in now.items())


@pytest.mark.parametrize(
    ("dataset", "shape"), [("cifar10", (3, 32, 32)), ("smallnorb", (1, 32, 32)), ("folder", (3, 32, 32))]
)
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_step_on_images_of_other_shapes(name, dataset, shape, tmp_path):
    torch.manual_seed(0)
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    options = SMALL[name] | {"data_dir": tmp_path, "batch_size": 4}
    system = SYSTEMS[name](dataset=dataset, **options)
    images, labels = torch.randint(256, (4, *shape)).byte(), torch.arange(4)
    named = system.step(images, labels, TrainState(system.optimizers, ShardedGenerator(0)))
    assert all(torch.isfinite(value) for value in named.values())
    few = data.Dataset(dataset, images, labels, images.repeat(3, 1, 1, 1), labels.repeat(3), size=32)
    system.eval()
    with torch.no_grad():
        assert all(images.shape[1:] == shape for images, _ in system.pictures(few).values())


@pytest.mark.parametrize("name", fast_only(["capsnet", "infocapsgan"], SYSTEMS))
def test_compiled_networks_do_the_same(name, digits):
    systems = []
    for compiled in (False, True):
        torch.manual_seed(0)
        system = SYSTEMS[name](**SMALL[name])
        if compiled:
            torch.compiler.reset()
            torch._dynamo.utils.counters.clear()
            system.compile_networks("aot_eager")
        systems.append((system, train(system, digits, 3)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    (eager, wanted), (compiled, found) = systems
    assert list(eager.state_dict()) == list(compiled.state_dict())
    for a, b in zip(wanted, found, strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-3)
    eager.load_state_dict(compiled.state_dict())
    torch.compiler.reset()


def test_no_weights_of_an_unsupervised_system_are_chosen():
    for system in SYSTEMS.values():
        supervised = issubclass(system, Supervised)
        assert hasattr(system.defaults(), "validation") == supervised
        assert system(width=8).validation_share == 0
    for name in ("capsnet", "encoder"):
        assert SYSTEMS[name](width=8, validation=True).validation_share == 0.1


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_folder_is_looked_through_once(name, tmp_path, monkeypatch):
    looked, listing = [], folder._listing
    monkeypatch.setattr(folder, "_listing", lambda data_dir: looked.append(data_dir) or listing(data_dir))
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    torch.manual_seed(0)
    options = SMALL[name] | {"data_dir": tmp_path, "batch_size": 4}
    system = SYSTEMS[name](dataset="folder", **options)
    images, labels = torch.randint(256, (4, 3, 32, 32)).byte(), torch.arange(4)
    for one in (system, copy.deepcopy(system), pickle.loads(pickle.dumps(system))):
        one.step(images, labels, TrainState(one.optimizers, ShardedGenerator(0)))
        assert one.image_shape == (3, 32, 10)
    assert looked == [tmp_path]


@pytest.mark.parametrize("place", ["", "one_class"])
@pytest.mark.parametrize("name", ["capsnet", "encoder"])
def test_what_is_trained_with_labels_needs_some(name, place, tmp_path):
    (tmp_path / place).mkdir(exist_ok=True)
    for number in range(5):
        Image.new("L", (8, 8), number).save(tmp_path / place / f"{number}.png")
    system = SYSTEMS[name](dataset="folder", data_dir=tmp_path, width=8)
    with pytest.raises(data.DataError, match=f"the images in {tmp_path} have none: takes a folder for each"):
        system.load_data()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_restored_state_goes_on_to_the_same_numbers(name, full, digits, tmp_path):
    torch.manual_seed(0)
    options = SMALL[name] | (FULL[name] if full else {})
    precision = options.get("precision", "fp32")
    system = SYSTEMS[name](**options)
    state = TrainState(system.optimizers, ShardedGenerator(0), precision=precision)
    images, labels = digits.train_images[:16], digits.train_labels[:16]
    for _ in range(3):
        system.step(images, labels, state)
    state.step = 3
    path = checkpoint.save(tmp_path, checkpoint.capture(system, state), seconds=1.5)
    wanted = system.step(images, labels, state)

    torch.manual_seed(1)
    other = SYSTEMS[name](**options)
    resumed = TrainState(other.optimizers, ShardedGenerator(1), precision=precision)
    checkpoint.restore(checkpoint.load(path), other, resumed)
    assert resumed.step == 3
    found = other.step(images, labels, resumed)
    assert {key: value.item() for key, value in found.items()} == {
        key: value.item() for key, value in wanted.items()
    }
    one, two = checkpoint.capture(system, state), checkpoint.capture(other, resumed)
    assert one.numbers | {"step": 3} == two.numbers
    for tensors, others in ((one.weights, two.weights), (one.tensors, two.tensors)):
        assert all(torch.equal(tensors[key], others[key]) for key in tensors | others)


@pytest.mark.parametrize("name", SYSTEMS)
def test_settings_survive_json(name, tmp_path):
    settings = dataclasses.replace(SYSTEMS[name].defaults("published", "mnist"), out=tmp_path)
    assert SYSTEMS[name].Settings.from_json(settings.to_json()) == settings


def test_settings_and_options_exclude_one_another():
    for system in SYSTEMS.values():
        with pytest.raises(ValueError, match="settings and options exclude one another"):
            system(system.defaults(), width=16)
