import pytest
import torch

from infocapsgan import data, losses
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.train_state import TrainState
from infocapsgan.systems import SYSTEMS, class_code
from infocapsgan.systems.class_code import ClassCodeGAN

NAMES = [name for name, system in SYSTEMS.items() if issubclass(system, ClassCodeGAN)]
OF_THE_GENERATOR = {"discriminator", "generator"}


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def made(name, **options):
    torch.manual_seed(0)
    return SYSTEMS[name](**{"width": 8, "batch_size": 16, **options})


class Recorded(TrainState):
    """Keeps the last loss that each optimiser was given."""

    def update(self, name, loss):
        self.losses = getattr(self, "losses", {}) | {name: loss.item()}
        super().update(name, loss)


def steps(system, digits, numbers, labels=None):
    """What the steps of these numbers name, on the same 16 images."""
    state = TrainState(system.optimizers, ShardedGenerator(0))
    labels = digits.train_labels[:16] if labels is None else labels
    named = []
    for number in numbers:
        state.step = number
        named.append(system.step(digits.train_images[:16], labels, state))
    return named


def test_which_systems_have_a_class_code():
    assert NAMES == ["infocapsgan", "infogan"]


@pytest.mark.parametrize("name", NAMES)
def test_the_labels_are_not_looked_at(name, digits):
    given = (digits.train_labels[:16], torch.zeros(16, dtype=torch.long))
    one, other = (steps(made(name, warm_up=0), digits, [0], labels) for labels in given)
    assert one == other


@pytest.mark.parametrize("name", NAMES)
def test_the_generator_comes_in_after_the_warm_up(name, digits):
    system = made(name, warm_up=1)
    generator = [weight.clone() for weight in system.generator.parameters()]
    (first,) = steps(system, digits, [0])
    assert set(first) == {"information", "consistency"}
    assert all(torch.equal(a, b) for a, b in zip(generator, system.generator.parameters(), strict=True))
    (second,) = steps(system, digits, [1])
    assert set(second) > set(first) | OF_THE_GENERATOR
    assert any(not torch.equal(a, b) for a, b in zip(generator, system.generator.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_training_that_ends_with_the_warm_up_leaves_the_generator_untrained(name):
    system = made(name, warm_up=7)
    assert "after the 7 steps of --warm-up, and there are 7" in system.untrained(7)
    assert not system.untrained(8)
    assert not made(name, warm_up=0).untrained(1)


def test_a_generator_that_is_not_wanted_is_not_missed():
    assert not made("infocapsgan", adversarial_weight=0, warm_up=7).untrained(3)


@pytest.mark.parametrize("name", NAMES)
def test_smoothness_counts_between_the_forming_of_classes_and_the_end_of_the_warm_up(name, digits):
    system = made(name, smoothness_after=1, warm_up=2)
    found = ["smoothness" in named for named in steps(system, digits, range(3))]
    assert found == [False, True, False]


@pytest.mark.parametrize("name", NAMES)
def test_as_published_real_images_say_nothing_of_the_classes(name, digits):
    system = made(name, recipe="published")
    assert not system.settings.learns_of_real_images
    (named,) = steps(system, digits, [0])
    assert set(named) >= OF_THE_GENERATOR
    assert not set(named) & {"information", "consistency", "smoothness"}


@pytest.mark.parametrize("name", NAMES)
def test_classes_form_on_real_images_alone(name, digits):
    system = made(name, warm_up=1000, smoothness_weight=0, consistency_weight=0, settled_rate=1.0)
    named = steps(system, digits, [0] * 80)
    assert named[-1]["information"] > named[0]["information"] + 0.5  # of log 10 = 2.3 nats


@pytest.mark.parametrize("name", NAMES)
def test_the_learning_rate_settles_over_the_warm_up(name):
    system = made(name, settled_rate=0.2, warm_up=100)
    state = TrainState(system.optimizers, ShardedGenerator(0))
    rates = []
    for state.step in (0, 50, 100, 1000):
        rates.append(system.decayed_rate(1e-2, state))
    assert rates == pytest.approx([1e-2, 6e-3, 2e-3, 2e-3])
    without = made(name, settled_rate=0.2, warm_up=0)
    assert without.decayed_rate(1e-2, state) == 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_how_many_images_are_of_each_class(name, digits):
    system = made(name).eval()
    few = digits.head(300)
    with torch.no_grad():
        metrics = system.evaluate(few)
        found = torch.bincount(system.cluster(few.test_images), minlength=10)
    shares = [metrics[f"share_of_cluster_{j}"] for j in range(10)]
    assert shares == pytest.approx((found / found.sum()).tolist())


@pytest.mark.parametrize("name", NAMES)
def test_pictures_have_a_code_in_each_row_and_a_noise_in_each_column(name, digits):
    system = made(name).eval()
    latents, noise_dim = [], system.settings.noise_dim
    system.sampling_generator.register_forward_hook(lambda _, inputs, __: latents.append(inputs[0]))
    with torch.no_grad():
        columns = system.pictures(digits)["samples"].columns
    noise, code, _ = latents[0].view(10, columns, -1).tensor_split((noise_dim, noise_dim + 10), dim=2)
    torch.testing.assert_close(noise, noise[:1].expand_as(noise))
    assert len(noise[0].unique(dim=0)) == columns
    assert torch.equal(code.argmax(dim=2), torch.arange(10)[:, None].expand(10, columns))


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_up_in_which_nothing_is_learned_is_refused(name):
    message = "--warm-up: got 9, takes 0 without --information-weight and --consistency-weight"
    with pytest.raises(ValueError, match=message):
        made(name, warm_up=9, information_weight=0, consistency_weight=0)


@pytest.mark.parametrize("name", NAMES)
def test_smoothness_alone_says_nothing_of_the_classes(name, digits):
    system = made(name, warm_up=0, information_weight=0, consistency_weight=0, smoothness_weight=1)
    (named,) = steps(system, digits, [0])
    assert set(named) >= OF_THE_GENERATOR
    assert not set(named) & {"information", "consistency", "smoothness"}


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_real_images_is_the_weighted_sum_of_what_is_named(name, digits):
    weights = {"information_weight": 0.7, "consistency_weight": 1.3, "smoothness_weight": 1.9}
    system = made(name, warm_up=9, smoothness_after=0, balance=1, **weights)
    state = Recorded(system.optimizers, ShardedGenerator(0))
    named = system.step(digits.train_images[:16], digits.train_labels[:16], state)
    wanted = -0.7 * named["information"] + 1.3 * named["consistency"] + 1.9 * named["smoothness"]
    assert list(state.losses.values()) == pytest.approx([wanted.item()], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_parts_of_that_loss_are_told(name, digits, monkeypatch):
    told = {}

    def spy(module, function):
        original = getattr(module, function)
        monkeypatch.setattr(
            module, function, lambda *given, **options: told.update(options) or original(*given, **options)
        )

    spy(losses, "mutual_information")
    spy(losses, "adversarial_smoothness")
    spy(class_code, "random_erasing")
    system = made(name, warm_up=9, smoothness_after=0, balance=2.5, smoothness_radius=1.5, erased=0.25)
    state = TrainState(system.optimizers, ShardedGenerator(0))
    system.step(digits.train_images[:16], digits.train_labels[:16], state)
    mean = state.processes.mean
    assert told == {"mean": mean, "balance": 2.5, "radius": 1.5, "share": 0.25, "background": -1}


@pytest.mark.parametrize("name", NAMES)
def test_the_losses_of_generator_and_discriminator_are_weighted_sums(name, digits):
    """Rates of 0: what a discriminator says of an image is then the same before and after its step."""
    rates = {"discriminator_rate": 0.0, "generator_rate": 0.0}
    if name == "infogan":
        rates |= {"classes_rate": 0.0, "categorical_weight": 0.6, "continuous_weight": 0.4}
    else:
        rates |= {"adversarial_weight": 0.7, "code_weight": 0.02, "diversity_weight": 0.3}
    system = made(name, **rates, warm_up=0, information_weight=0, consistency_weight=0)
    state = Recorded(system.optimizers, ShardedGenerator(0))
    named = system.step(digits.train_images[:16], digits.train_labels[:16], state)
    named = {key: value.item() for key, value in named.items()}
    if name == "infogan":
        code = 0.6 * named["categorical"] + 0.4 * named["continuous"]
        wanted = {"discriminator": named["discriminator"] + code, "generator": named["generator"] + code}
    else:
        code = 0.02 * 16 * named["code"]
        wanted = {
            "discriminator": 0.7 * named["discriminator"] + code,
            "generator": 0.7 * named["generator"] + code + 0.3 * named["diversity"],
        }
    assert state.losses == pytest.approx(wanted, rel=1e-4)
