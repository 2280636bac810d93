import math
from functools import partial

import pytest
import torch

from infocapsgan import data
from infocapsgan.data.augment import (
    color_jitter,
    elastic_transform,
    random_affine,
    random_horizontal_flip,
    random_shift,
)
from infocapsgan.data.dataset import to_unit
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.train_state import TrainState
from infocapsgan.models.capsule_encoder import StackedCapsuleEncoder
from infocapsgan.systems import CapsNet, capsnet
from infocapsgan.systems.capsnet import image_error, schedule
from tests.parameters import parameter_count
from tests.tiers import slow


def test_published_parameter_counts():
    model = CapsNet(recipe="published").model
    assert parameter_count(model.encoder) == 6_804_384
    assert parameter_count(model.decoder) == 1_411_344


@pytest.mark.parametrize(
    ("loss", "decoder"),
    [("squared", "fc"), slow("squared", "deconv"), ("absolute", "fc"), slow("absolute", "deconv")],
)
def test_training_lowers_both_losses(decoder, loss):
    torch.manual_seed(0)
    digits = data.load("digits")
    options = {"decoder": decoder, "decoder_batch_norm": decoder == "deconv", "reconstruction_loss": loss}
    system = CapsNet(width=8, batch_size=16, leaky=True, encoder_batch_norm=True, shift=0, **options)
    state = TrainState(system.optimizers, ShardedGenerator(0))
    rows = [system.step(digits.train_images[:16], digits.train_labels[:16], state) for _ in range(20)]
    for name in ("margin", "reconstruction"):
        assert rows[-1][name] < 0.9 * rows[0][name]


def test_the_reconstruction_comes_from_the_class_that_is_given_or_from_the_longest():
    torch.manual_seed(0)
    model = CapsNet(width=8).model.eval()
    images = torch.rand(4, 1, 28, 28)
    capsules, rebuilt = model(images)
    longest = capsules.norm(dim=2).argmax(dim=1)
    torch.testing.assert_close(model(images, longest)[1], rebuilt)
    assert not torch.allclose(model(images, (longest + 1) % 10)[1], rebuilt)


def test_errors_are_sums_over_pixels():
    rebuilt, images = torch.tensor([[0.5, 1.0], [0, 0]]), torch.tensor([[0.0, 0], [0, 0.5]])
    assert image_error(rebuilt, images, "squared").tolist() == [1.25, 0.25]
    assert image_error(rebuilt, images, "absolute").tolist() == [1.5, 0.5]


def test_schedules_by_hand():
    assert schedule("constant", 7) == 1
    assert schedule("early", 0) == 0
    assert schedule("early", 16) == pytest.approx(math.tanh(1))
    assert schedule("late", 8 * math.pi) == 0.5


def test_the_schedule_weighs_the_reconstruction_in_a_step():
    # "early" begins with a weight of 0: the decoder then stays, and later does not.
    torch.manual_seed(0)
    system = CapsNet(width=8, batch_size=4, reconstruction_schedule="early", reconstruction_weight=1.0)
    state = TrainState(system.optimizers, ShardedGenerator(0), steps_per_epoch=1)
    images, labels = torch.randint(256, (4, 1, 28, 28)).byte(), torch.arange(4)
    before = [weight.clone() for weight in system.model.decoder.parameters()]
    for state.step, stays in ((0, True), (1, False)):
        system.step(images, labels, state)
        now = system.model.decoder.parameters()
        assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True)) == stays


@pytest.mark.parametrize(
    ("options", "iterations", "norm", "leaky"),
    [
        ({}, 3, torch.nn.Identity, False),
        ({"iterations": 2, "encoder_batch_norm": True, "leaky": True}, 2, torch.nn.BatchNorm2d, True),
    ],
)
def test_the_encoder_is_as_the_settings_want_it(options, iterations, norm, leaky):
    encoder = CapsNet(width=8, **options).model.encoder
    assert (encoder.classes.iterations, encoder.classes.leaky) == (iterations, leaky)
    assert isinstance(encoder.norm, norm)


def test_a_stacked_encoder_is_as_the_settings_want_it():
    encoder = CapsNet(width=8, stem="stacked", iterations=2, leaky=True).model.encoder
    assert isinstance(encoder, StackedCapsuleEncoder)
    assert (encoder.classes.iterations, encoder.classes.leaky) == (2, True)


def test_published_initialisation():
    torch.manual_seed(0)
    model = CapsNet(recipe="published").model
    assert model.encoder.classes.weight.std().item() == pytest.approx(0.002, rel=0.01)
    conv, dense = model.encoder.conv.weight, model.decoder.layers[0].weight
    assert conv.std().item() == pytest.approx(0.02 * math.sqrt(2 / (81 + 256 * 81)), rel=0.03)
    assert dense.std().item() == pytest.approx(0.02 * math.sqrt(2 / (160 + 512)), rel=0.03)


def test_test_images_are_not_augmented(monkeypatch):
    system = CapsNet(width=8, shift=2, deform=1.0).eval()
    monkeypatch.setattr(system, "augmented", None)
    with torch.no_grad():
        system.evaluate(data.load("digits").head(20))


def test_the_validation_loss_weighs_the_squared_error():
    system = CapsNet(width=8, reconstruction_weight=0.1).eval()
    few = data.load("digits").head(20)
    with torch.no_grad():
        metrics, found = system.evaluate(few), system.validation_loss(few)
    assert found == pytest.approx(metrics["margin_loss"] + 0.1 * metrics["squared_error"])


def test_pictures_are_rebuilt_from_the_true_and_below_from_the_predicted_class(monkeypatch):
    system = CapsNet(width=8).eval()
    monkeypatch.setattr(system, "predicted", lambda capsules, labels: (labels + 1) % 10)
    digits = data.load("digits")
    images, labels = to_unit(digits.test_images[:10]), digits.test_labels[:10]
    with torch.no_grad():
        sheet = system.pictures(digits)["reconstructions"]
        wanted = [images, *(system.model(images, classes)[1] for classes in (labels, (labels + 1) % 10))]
    assert sheet.columns == 10
    assert sheet.heads[0] == f"{labels[0]}\n{(labels[0] + 1) % 10}"
    torch.testing.assert_close(sheet.images, torch.cat(wanted))


@pytest.mark.parametrize(
    ("option", "function"),
    [
        ({"deform": 2.0}, partial(elastic_transform, strength=2.0)),
        ({"shift": 3}, partial(random_shift, pixels=3)),
        ({"turn": 10.0}, partial(random_affine, degrees=10, scale=0, shear=0, shift=0)),
        ({"resize": 0.1}, partial(random_affine, degrees=0, scale=0.1, shear=0, shift=0)),
        ({"shear": 0.2}, partial(random_affine, degrees=0, scale=0, shear=0.2, shift=0)),
        ({"flip": True}, random_horizontal_flip),
        ({"brightness": 0.3}, partial(color_jitter, brightness=0.3, contrast=0)),
        ({"contrast": 0.3}, partial(color_jitter, brightness=0, contrast=0.3)),
        ({}, lambda images, rng: images),
    ],
    # Not the functions: their addresses differ among pytest-xdist's processes.
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_one_augmentation_alone(option, function):
    images = torch.rand(6, 1, 28, 28)
    system = CapsNet(**{"width": 8, "shift": 0} | option)
    assert torch.equal(system.augmented(images, ShardedGenerator(3)), function(images, ShardedGenerator(3)))


def test_every_augmentation_at_once():
    torch.manual_seed(0)
    system = CapsNet(width=8, shift=1, deform=1.0, flip=True, brightness=0.1, contrast=0.1)
    images = torch.rand(4, 1, 28, 28)
    changed = system.augmented(images, ShardedGenerator(0))
    assert changed.shape == images.shape
    assert not torch.allclose(changed, images)
    assert torch.equal(changed, system.augmented(images, ShardedGenerator(0)))


def test_published_settings():
    s = CapsNet.defaults("published", "mnist")
    assert (s.learning_rate, s.rate_decay, s.batch_size, s.iterations) == (1e-3, 1, 128, 3)
    assert (s.reconstruction_weight, s.reconstruction_loss) == (0.0005, "squared")
    assert (s.reconstruction_schedule, s.decoder, s.leaky, s.width) == ("constant", "fc", False, 256)
    assert (s.stem, s.turn, s.resize, s.shear) == ("single", 0, 0, 0)
    assert CapsNet.defaults("published", "multi-mnist").stem == "single"


def test_published_treatment_of_each_data_set():
    defaults = [CapsNet.defaults("published", name) for name in ("mnist", "smallnorb", "cifar10")]
    assert [(s.shift, s.flip, round(s.brightness * 255), s.contrast) for s in defaults] == [
        (2, False, 0, 0),
        (0, False, 32, 0.5),
        (0, True, 63, 0.8),
    ]


def test_the_learning_rate_falls_by_epochs():
    system = CapsNet(width=8, rate_decay=0.5, learning_rate=0.1)
    state = TrainState(system.optimizers, ShardedGenerator(0), steps_per_epoch=2)
    rates = []
    for step in range(5):
        state.step = step
        system.step(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.zeros(2, dtype=torch.long), state)
        rates.append(system.optimizers["model"].param_groups[0]["lr"])
    assert rates == [0.1, 0.1, 0.05, 0.05, 0.025]


def test_training_rebuilds_from_the_true_class(monkeypatch):
    chosen, masked = [], capsnet.masked
    monkeypatch.setattr(capsnet, "masked", lambda *given: chosen.append(given[1]) or masked(*given))
    torch.manual_seed(0)
    system = CapsNet(width=8, batch_size=20)
    images, labels = torch.randint(256, (20, 1, 28, 28)).byte(), torch.arange(10).repeat(2)
    system.step(images, labels, TrainState(system.optimizers, ShardedGenerator(0)))
    assert [classes.tolist() for classes in chosen] == [labels.tolist()]
