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
from infocapsgan.engine import checkpoint
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.train_state import DTYPES, TrainState
from infocapsgan.systems import ABILITIES, SYSTEMS, NotApplicableError
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


GENERATES, ROUTES = {"generate", "latents"}, {"capsules", "routing"}
CAN = {
    "capsnet": {"classify", "reconstruct", "decode"} | ROUTES,
    "encoder": {"classify"} | ROUTES,
    "infocapsgan": {"cluster"} | GENERATES | ROUTES,
    "mimic": {"generate", "reconstruct"} | ROUTES,
    "infogan": {"cluster"} | GENERATES,
    "capsulegan": GENERATES | ROUTES,
    "dcgan": GENERATES,
}


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
    for sheet in pictures.values():
        assert sheet.images.shape[1:] == (1, 28, 28)
        assert len(sheet.images) % sheet.columns == 0
        assert 0 <= sheet.images.min() <= sheet.images.max() <= 1


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
    ("dataset", "shape"), [("cifar10", (3, 32, 32)), ("smallnorb", (1, 32, 32)), ("folder", (3, 64, 64))]
)
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_few_steps_on_images_of_other_shapes(name, dataset, shape, tmp_path):
    torch.manual_seed(0)
    options = SMALL[name] | {"data_dir": tmp_path, "batch_size": 4}
    image_shape = data.ImageShape(shape[0], shape[1], 10) if dataset == "folder" else None
    system = SYSTEMS[name](dataset=dataset, image_shape=image_shape, **options)
    images, labels = torch.randint(256, (4, *shape)).byte(), torch.arange(4)
    state = TrainState(system.optimizers, ShardedGenerator(0))
    for state.step in range(3):
        named = system.step(images, labels, state)
        assert all(torch.isfinite(value) for value in named.values())
    few = data.Dataset(dataset, images, labels, images.repeat(3, 1, 1, 1), labels.repeat(3), size=32)
    system.eval()
    with torch.no_grad():
        assert all(sheet.images.shape[1:] == shape for sheet in system.pictures(few).values())


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
    looked, shape = [], data.ImageShape(3, 32, 10)
    monkeypatch.setattr(data, "image_shape", lambda *given, **more: looked.append(given) or shape)
    torch.manual_seed(0)
    options = SMALL[name] | {"data_dir": tmp_path, "batch_size": 4}
    system = SYSTEMS[name](dataset="folder", **options)
    images, labels = torch.randint(256, (4, 3, 32, 32)).byte(), torch.arange(4)
    for one in (system, copy.deepcopy(system), pickle.loads(pickle.dumps(system))):
        one.step(images, labels, TrainState(one.optimizers, ShardedGenerator(0)))
        assert one.image_shape == shape
    assert looked == [("folder", tmp_path)]
    SYSTEMS[name](dataset="folder", image_shape=shape, **options)
    assert len(looked) == 1


@pytest.mark.parametrize("name", SYSTEMS)
def test_abilities(name, digits):
    system, images = SYSTEMS[name](**SMALL[name]).eval(), digits.test_images[:6]
    able = {ability for ability in ABILITIES if not system.why_not(ability)}
    assert able == CAN[name]
    unit = images.float() / 255
    with torch.no_grad():
        if "capsules" in able:
            primary, classes = system.capsules(images)
            assert (primary.shape[2], classes.shape) == (8, (6, 10, 16))
            assert system.routing.weight.shape[0] == primary.shape[1]
            torch.testing.assert_close(system.capsules(unit).classes, classes)
        if "classify" in able:
            lengths = system.classify(images)
            assert lengths.shape == (6, 10)
            assert torch.equal(lengths.argmax(dim=1), system.test_predictions(digits)["predicted"][:6])
            torch.testing.assert_close(system.classify(unit), lengths)
        if "cluster" in able:
            probabilities = system.code_probabilities(images)
            torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(6))
            assert torch.equal(probabilities.argmax(dim=1), system.cluster(images))
            torch.testing.assert_close(system.code_probabilities(unit), probabilities)
        if "reconstruct" in able:
            rebuilt = system.reconstruct(images)
            assert rebuilt.shape == images.shape
            assert 0 <= rebuilt.min() <= rebuilt.max() <= 1
            torch.testing.assert_close(system.reconstruct(unit), rebuilt)
        if "generate" in able:
            latents = system.random_latents(3, ShardedGenerator(0), images=images)
            assert system.generate(latents).shape == (3, 1, 28, 28)
        if "latents" in able:
            noise = torch.randn(2, system.noise_dim)
            assert system.latents(noise).shape[1] == latents.shape[1]
    for ability in set(ABILITIES) - able:
        with pytest.raises(NotApplicableError, match=f"x does not apply to this {name}: .*; it applies to "):
            system.require(ability, "x")


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
