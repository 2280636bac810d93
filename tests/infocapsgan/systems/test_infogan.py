import math

import pytest
import torch

from infocapsgan import data
from infocapsgan.data.dataset import to_symmetric
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.train_state import TrainState
from infocapsgan.metrics import morphometry as strokes
from infocapsgan.models.infogan import InfoGANGenerator, InfoGANTrunk
from infocapsgan.systems import InfoGAN
from infocapsgan.systems.infogan import LEAN
from tests.parameters import parameter_count


def test_parameter_counts_by_hand():
    system = InfoGAN(recipe="published")
    # Conv(64), Conv(128), BN, dense 1024, BN; dense 1; dense 128, BN, dense 12
    trunk = (16 * 64 + 64) + (64 * 128 * 16 + 128 + 256) + (6272 * 1024 + 1024 + 2048)
    assert parameter_count(system.discriminator) == trunk + 1025 + (1024 * 128 + 128 + 256) + (128 * 12 + 12)
    # dense 1024, BN, dense 6272, BN, ConvT(64), BN, ConvT(1)
    expected = (74 * 1024 + 1024 + 2048) + (1024 * 6272 + 6272 * 3) + (128 * 64 * 16 + 64 + 128) + 1025
    assert parameter_count(system.generator) == expected


def test_colour_images_of_32_pixels_have_one_more_level():
    images = InfoGANGenerator(76, 3, 32, width=8)(torch.randn(2, 76))
    assert images.shape == (2, 3, 32, 32)
    assert InfoGANTrunk(3, 32, width=8)(images).shape == (2, 128)


def test_published_settings():
    s = InfoGAN.defaults("published", "mnist")
    assert (s.noise_dim, s.continuous_codes, s.continuous_weight, s.categorical_weight) == (62, 2, 0.5, 1)
    assert (s.batch_size, s.epochs, s.discriminator_rate, s.generator_rate) == (256, 50, 2e-4, 1e-3)
    assert s.meaning_weight == 0
    s = InfoGAN.defaults("published", "cifar10")
    assert (s.noise_dim, s.continuous_weight, s.batch_size, s.epochs) == (64, 1, 256, 150)


def test_one_continuous_code_changes_along_a_row():
    system = InfoGAN(width=8).eval()
    seen = []
    system.generator.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        pictures = system.pictures(data.load("digits"))
    assert list(pictures) == ["samples", "continuous_code_0", "continuous_code_1"]
    for index, latents in enumerate(seen[1:]):
        rows = latents.view(10, 10, -1)
        code = 62 + 10 + index
        assert (rows[:, 1:, code] > rows[:, :-1, code]).all()
        others = [number for number in range(74) if number != code]
        assert (rows[:, :, others] == rows[:, :1, others]).all()
        assert rows[:, 0, 62:72].argmax(dim=1).tolist() == list(range(10))


def test_accuracies_of_detection_are_named():
    torch.manual_seed(0)
    digits = data.load("digits")
    system = InfoGAN(width=8, batch_size=16, warm_up=0)
    named = system.step(
        digits.train_images[:16], digits.train_labels[:16], TrainState(system.optimizers, ShardedGenerator(0))
    )
    assert set(named) >= {"discriminator", "generator", "categorical", "continuous"}
    assert all(0 <= named[f"{kind}_accuracy"] <= 1 for kind in ("real", "generated"))


def test_information_loss_by_hand():
    system = InfoGAN(width=8)
    categories = torch.zeros(2, 1, 10)
    found, wanted = torch.tensor([[0.0, 1], [1, 1]]), torch.tensor([[1.0, 1], [1, -1]])
    total, categorical, squared = system.information_loss(categories, torch.tensor([[3], [4]]), found, wanted)
    assert categorical.item() == pytest.approx(math.log(10))
    assert squared.item() == 2.5
    assert total.item() == pytest.approx(math.log(10) + 0.5 * 2.5)


def test_the_codes_train_the_trunk_that_discriminator_and_recogniser_share():
    torch.manual_seed(0)
    digits = data.load("digits")
    trained = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        system = InfoGAN(width=8, batch_size=16, warm_up=0, categorical_weight=weight)
        system.step(
            digits.train_images[:16],
            digits.train_labels[:16],
            TrainState(system.optimizers, ShardedGenerator(0)),
        )
        trained.append(system.discriminator.trunk.layers[0].weight.detach().clone())
    assert not torch.equal(*trained)


def test_training_lowers_the_code_losses():
    torch.manual_seed(0)
    digits = data.load("digits")
    system = InfoGAN(width=8, batch_size=32, warm_up=0, noise_dim=4)
    state = TrainState(system.optimizers, ShardedGenerator(0))
    rows = [system.step(digits.train_images[:32], digits.train_labels[:32], state) for _ in range(60)]
    assert rows[-1]["categorical"] < 0.8 * rows[0]["categorical"]


def test_continuous_codes_are_sampled_from_minus_one_to_one(monkeypatch):
    seen, latents = [], InfoGAN.latents
    monkeypatch.setattr(InfoGAN, "latents", lambda *given: seen.append(given[3]) or latents(*given))
    torch.manual_seed(0)
    system = InfoGAN(width=8, batch_size=64, warm_up=0)
    digits = data.load("digits")
    system.step(
        digits.train_images[:64], digits.train_labels[:64], TrainState(system.optimizers, ShardedGenerator(0))
    )
    (codes,) = seen
    assert -1 <= codes.min() < -0.8
    assert 0.8 < codes.max() <= 1


def test_the_loss_of_what_codes_mean_by_hand(monkeypatch):
    system, images = InfoGAN(width=8), data.load("digits").train_images[:64]
    real = to_symmetric(images)

    def measured(images):
        unit = (images + 1) / 2
        found = [strokes.slant(unit) / LEAN, strokes.stroke_width(unit), strokes.digit_width(unit)]
        return None, None, torch.stack([measure.float() for measure in found], dim=1)

    monkeypatch.setattr(system.discriminator, "forward", measured)
    _, _, values = measured(real)
    loss = system.meaning_loss(real, values, ShardedGenerator(0))
    still = system.meaning_loss(real, 0 * values, ShardedGenerator(0))
    # A code that measures slant is right to 0.01, one that measures strokes roughly: E[a²] is 1/3 for each.
    assert loss < 0.15
    assert still > 1
    monkeypatch.setattr(system.discriminator, "forward", lambda images: (None, None, values))
    amounts = ShardedGenerator(0).uniform(64, 2) * 2 - 1
    torch.testing.assert_close(
        system.meaning_loss(real, values, ShardedGenerator(0)), amounts.square().sum(dim=1).mean()
    )
    monkeypatch.setattr(system.discriminator, "forward", lambda images: (None, None, values[:, :1]))
    torch.testing.assert_close(
        system.meaning_loss(real, values[:, :1], ShardedGenerator(0)), amounts[:, 0].square().mean()
    )


@pytest.mark.parametrize(
    "options", [{}, {"warm_up": 0, "information_weight": 0.0, "consistency_weight": 0.0}]
)
def test_real_images_teach_what_codes_mean(options):
    torch.manual_seed(0)
    digits = data.load("digits")
    system = InfoGAN(width=8, batch_size=32, meaning_weight=1.0, **options)
    state = TrainState(system.optimizers, ShardedGenerator(0), steps=60)
    rows = [system.step(digits.train_images[:32], digits.train_labels[:32], state) for _ in range(60)]
    first, last = (sum(row["meaning"] for row in part) / 10 for part in (rows[:10], rows[-10:]))
    assert last < 0.6 * first


@pytest.mark.parametrize("options", [{"meaning_weight": 0.0}, {"meaning_weight": 1.0, "continuous_codes": 0}])
def test_codes_are_left_open(options):
    system, digits = InfoGAN(width=8, batch_size=8, **options), data.load("digits")
    named = system.step(
        digits.train_images[:8], digits.train_labels[:8], TrainState(system.optimizers, ShardedGenerator(0))
    )
    assert "meaning" not in named


def test_each_part_has_its_own_learning_rate():
    system = InfoGAN(width=8, discriminator_rate=3e-4, generator_rate=5e-4, classes_rate=7e-4)
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in system.optimizers.items()}
    assert rates == {"discriminator": 3e-4, "generator": 5e-4, "classes": 7e-4}
    betas = {optimizer.param_groups[0]["betas"] for optimizer in system.optimizers.values()}
    assert betas == {(0.5, 0.999)}


def test_several_categorical_codes_of_any_number_of_values():
    torch.manual_seed(0)
    digits = data.load("digits")
    system = InfoGAN(width=8, batch_size=32, warm_up=0, categorical_codes=3, values=4, noise_dim=4)
    assert (system.codes, system.latents(torch.zeros(2, 4)).shape) == (4, (2, 4 + 3 * 4 + 2))
    state = TrainState(system.optimizers, ShardedGenerator(0))
    rows = [system.step(digits.train_images[:32], digits.train_labels[:32], state) for _ in range(60)]
    assert rows[0]["categorical"] > 2.5 * math.log(4)  # of each code
    assert rows[-1]["categorical"] < 0.8 * rows[0]["categorical"]
    system.eval()
    with torch.no_grad():
        _, categories, continuous = system.discriminator(torch.zeros(5, 1, 28, 28))
        metrics = system.evaluate(digits.head(100))
        sheets = system.pictures(digits)
        latents = system.random_latents(200, ShardedGenerator(0), code=torch.full((200,), 3))
    assert (categories.shape, continuous.shape) == ((5, 3, 4), (5, 2))
    assert (system.label_of_code >= 0).all()  # four clusters have four of the ten labels
    assert len([name for name in metrics if name.startswith("share_of_cluster")]) == 4
    names = ["samples", "continuous_code_0", "continuous_code_1", "categorical_code_1", "categorical_code_2"]
    assert list(sheets) == names
    codes = latents[:, 4:16].view(200, 3, 4)
    assert (codes.sum(dim=2) == 1).all()
    assert (codes[:, 0].argmax(dim=1) == 3).all()
    assert codes[:, 1:].sum(dim=0).min() > 30


def test_the_first_code_and_all_codes_of_a_latent():
    system, noise = InfoGAN(width=8, categorical_codes=2, values=3, noise_dim=1), torch.zeros(2, 1)
    first = system.latents(noise, torch.tensor([2, 1]))
    assert first[:, 1:7].tolist() == [[0, 0, 1, 1, 0, 0], [0, 1, 0, 1, 0, 0]]
    both = system.latents(noise, torch.tensor([[2, 1], [0, 2]]), torch.ones(2, 2))
    assert both.tolist() == [[0, 0, 0, 1, 0, 1, 0, 1, 1], [0, 1, 0, 0, 0, 0, 1, 1, 1]]
