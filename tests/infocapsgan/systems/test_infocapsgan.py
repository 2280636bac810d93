import pytest
import torch

from infocapsgan import data
from infocapsgan.engine.distributed import Processes
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.train_state import TrainState
from infocapsgan.models.capsule_encoder import Capsules
from infocapsgan.systems import InfoCapsGAN
from infocapsgan.systems.infocapsgan import compare_capsules
from tests.parameters import parameter_count
from tests.tiers import slow


def test_published_parameter_counts():
    system = InfoCapsGAN(recipe="published")
    assert parameter_count(system.generator) == 8_059_585
    assert parameter_count(system.discriminator) == 6_813_109


def test_published_settings():
    settings = InfoCapsGAN.defaults("published", "mnist")
    assert (settings.generator_rate, settings.discriminator_rate) == (2e-4, 2e-5)
    assert (settings.batch_size, settings.epochs, settings.noise_dim) == (100, 30, 52)
    assert (settings.code_weight, settings.latent) == (0.01, "squashed")


def test_published_initialisation():
    torch.manual_seed(0)
    system = InfoCapsGAN(recipe="published")
    generator, discriminator = system.generator, system.discriminator
    for layer, K, D, J in (
        (generator.classes, 62, 16, 10),
        (generator.primary, 16, 8, 1152),
        (discriminator.encoder.classes, 8, 16, 10),
    ):
        assert layer.weight.std().item() == pytest.approx((3 / (K + D + J)) ** 0.5, rel=0.03)
    assert discriminator.last.weight.std().item() == pytest.approx((2 / (16 + 52)) ** 0.5, rel=0.03)
    fans = 81 + 256 * 81
    assert discriminator.encoder.conv.weight.std().item() == pytest.approx((2 / fans) ** 0.5, rel=0.03)


def test_noise_and_code_are_squashed_together_as_published():
    system = InfoCapsGAN(recipe="published", width=8)
    noise, code = torch.randn(5, 52), torch.arange(5)
    latent = system.latents(noise, code)
    together = torch.cat([noise, torch.eye(10)[:5]], dim=1)
    n = together.norm(dim=1, keepdim=True)
    torch.testing.assert_close(latent, together * n / (1 + n**2))
    assert InfoCapsGAN(width=8).latents(noise, code)[:, 52:].argmax(dim=1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("recipe", "loss"), [("tuned", "code"), slow("published", "discriminator")])
def test_training_lowers_the_losses(recipe, loss):
    torch.manual_seed(0)
    digits = data.load("digits")
    system = InfoCapsGAN(
        recipe=recipe,
        width=8,
        batch_size=32,
        discriminator_rate=1e-3,
        settled_rate=1.0,
        code_weight=0.01,
        generator_rate=1e-3,
        warm_up=0,
    )
    state = TrainState(system.optimizers, ShardedGenerator(0))
    rows = [system.step(digits.train_images[:32], digits.train_labels[:32], state) for _ in range(60)]
    assert sum(row[loss] for row in rows[-5:]) / 5 < 0.8 * rows[0][loss]


def test_without_the_adversarial_part_the_generator_rests():
    torch.manual_seed(0)
    system = InfoCapsGAN(width=8, batch_size=16, adversarial_weight=0, smoothness_after=0)
    before = [weight.clone() for weight in system.generator.parameters()]
    digits = data.load("digits")
    state = TrainState(system.optimizers, ShardedGenerator(0))
    named = system.step(digits.train_images[:16], digits.train_labels[:16], state)
    assert set(named) == {"information", "consistency", "smoothness"}
    assert all(torch.equal(a, b) for a, b in zip(before, system.generator.parameters(), strict=True))


def test_what_would_learn_nothing_is_refused():
    with pytest.raises(ValueError, match="--adversarial-weight: got 0, takes more without --information"):
        InfoCapsGAN(width=8, adversarial_weight=0, warm_up=0, information_weight=0, consistency_weight=0)


def test_a_batch_without_neighbours_is_refused():
    with pytest.raises(ValueError, match="--batch-size: got 1, takes at least 2 with --diversity-weight"):
        InfoCapsGAN(width=8, batch_size=1)
    digits = data.load("digits")
    system = InfoCapsGAN(width=8, batch_size=6)
    state = TrainState(system.optimizers, ShardedGenerator(0, world=2), processes=Processes(0, 2))
    with pytest.raises(ValueError, match="--batch-size: got 6, takes an even number for each of the 2"):
        system.step(digits.train_images[:3], digits.train_labels[:3], state)


def test_neighbours_are_of_one_class_where_their_images_are_kept_apart(monkeypatch):
    codes, latents = [], InfoCapsGAN.latents
    monkeypatch.setattr(InfoCapsGAN, "latents", lambda *given: codes.append(given[2]) or latents(*given))
    digits = data.load("digits")
    for weight, B in ((0.0, 16), (0.5, 16), (0.5, 7)):
        torch.manual_seed(0)
        system = InfoCapsGAN(width=8, batch_size=B, warm_up=0, diversity_weight=weight)
        state = TrainState(system.optimizers, ShardedGenerator(0))
        named = system.step(digits.train_images[:B], digits.train_labels[:B], state)
        code = codes.pop()
        assert len(code) == B
        assert code.unique().numel() > 2
        together = torch.equal(code[: B // 2 * 2 : 2], code[1::2])
        assert (together, "diversity" in named) == (bool(weight), bool(weight))


def test_class_capsules_are_scaled_by_one_plus_their_length():
    torch.manual_seed(0)
    discriminator = InfoCapsGAN(width=8).discriminator
    with torch.no_grad():
        discriminator.encoder.classes.weight.mul_(100)
    _, last, capsules = discriminator(torch.rand(3, 1, 28, 28))
    assert capsules.classes.norm(dim=-1).max() > 0.1
    scaled = capsules.classes * (1 + capsules.classes.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(last, discriminator.last(scaled).flatten(1))


def test_each_network_has_its_own_learning_rate():
    system = InfoCapsGAN(width=8, generator_rate=3e-4, discriminator_rate=5e-4)
    rates = {
        name: {group["lr"] for group in optimizer.param_groups}
        for name, optimizer in system.optimizers.items()
    }
    assert rates == {"generator": {3e-4}, "discriminator": {5e-4}}


@pytest.mark.parametrize("details", [True, False])
def test_the_verdict_reads_the_primary_capsules_where_told(details):
    torch.manual_seed(0)
    system = InfoCapsGAN(width=8, details=details)
    discriminator = system.discriminator
    images = torch.rand(3, 1, 28, 28)
    logit, last, capsules = discriminator(images)
    wanted = discriminator.verdict(last).flatten()
    if details:
        first, _, second = discriminator.details
        hidden = capsules.primary.flatten(1) @ first.weight.T + first.bias
        wanted = wanted + (torch.maximum(hidden, 0.2 * hidden) @ second.weight.T + second.bias).flatten()
    torch.testing.assert_close(logit, wanted)
    assert any(key.startswith("discriminator.details") for key in system.state_dict()) == details


def test_before_the_generator_comes_in_it_is_as_if_there_were_none():
    digits = data.load("digits")
    weights = []
    for weight in (0, 1):
        torch.manual_seed(0)
        system = InfoCapsGAN(width=8, batch_size=16, adversarial_weight=weight, warm_up=4, smoothness_after=2)
        state = TrainState(system.optimizers, ShardedGenerator(0))
        for step in range(4):
            state.step = step
            system.step(digits.train_images[:16], digits.train_labels[:16], state)
        weights.append(list(system.discriminator.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_the_encoder_settles_over_the_warm_up_and_the_verdict_does_not():
    digits = data.load("digits")
    system = InfoCapsGAN(width=8, batch_size=8, discriminator_rate=1e-2, settled_rate=0.2, warm_up=100)
    optimizer = system.optimizers["discriminator"]
    state = TrainState(system.optimizers, ShardedGenerator(0))
    rates = []
    for step in (0, 50, 100):
        state.step = step
        system.step(digits.train_images[:8], digits.train_labels[:8], state)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert [encoder for encoder, _ in rates] == pytest.approx([1e-2, 6e-3, 2e-3])
    assert {verdict for _, verdict in rates} == {1e-2}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        list(system.discriminator.parameters())
    )


def test_capsules_compared_by_hand():
    given = Capsules(torch.tensor([[[3.0, 4]]]), torch.tensor([[[1.0, 0]]]))
    seen = Capsules(torch.tensor([[[0.0, 0]]]), torch.tensor([[[0.0, 2]]]))
    assert compare_capsules(given, seen) == {
        "class_capsule_length": 2,
        "primary_distance": 5,
        "primary_cosine": 0,
        "classes_distance": pytest.approx(5**0.5),
        "classes_cosine": 0,
    }


@pytest.mark.parametrize("evidence", ["length", "unsquashed"])
def test_what_the_class_probabilities_are_taken_from(evidence):
    torch.manual_seed(0)
    system = InfoCapsGAN(width=8, evidence=evidence, temperature=3.0)
    images = torch.rand(4, 1, 28, 28) * 2 - 1
    v = system.discriminator(images).capsules.classes.norm(dim=-1)
    wanted = 3 * (v if evidence == "length" else (v / (1 - v)).sqrt())
    torch.testing.assert_close(system.class_logits(images), wanted)
