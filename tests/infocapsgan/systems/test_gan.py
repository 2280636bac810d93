"""What the generative adversarial systems have in common."""

import json

import pytest
import torch

from infocapsgan import data, losses
from infocapsgan.engine import loaded_run as trained
from infocapsgan.engine.loop import train
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.run_directory import read_metrics
from infocapsgan.engine.train_state import TrainState
from infocapsgan.evaluate import evaluate
from infocapsgan.systems import DCGAN, SYSTEMS, CapsuleGAN, Mimic
from infocapsgan.systems.gan import GAN, morph
from infocapsgan.systems.mimic import squared_error
from tests.parameters import parameter_count
from tests.tiers import fast_only

GANS = [name for name, system in SYSTEMS.items() if issubclass(system, GAN)]
SMALL = {name: {"width": 8, "batch_size": 8} for name in GANS}
SMALL["infocapsgan"]["warm_up"] = SMALL["infogan"]["warm_up"] = 0
for name in ("capsulegan", "dcgan"):
    SMALL[name]["generator_width"] = 8


def step(system, steps=1):
    digits = data.load("digits")
    state = TrainState(system.optimizers, ShardedGenerator(0))
    for _ in range(steps):
        named = system.step(digits.train_images[:8], digits.train_labels[:8], state)
        state.step += 1
    return named


def close(found, wanted):
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, msg=lambda text, key=key: f"{key}: {text}")


def test_routing_iterations_of_the_discriminator():
    for options, iterations in (({"recipe": "published"}, 5), ({"iterations": 2}, 2)):
        discriminator = CapsuleGAN(width=8, generator_width=8, **options).discriminator
        assert discriminator.encoder.classes.iterations == iterations


@pytest.mark.parametrize("loss", ["hinge", "wasserstein"])
@pytest.mark.parametrize("name", GANS)
def test_other_losses_with_spectral_norm_and_average(name, loss):
    torch.manual_seed(0)
    system = SYSTEMS[name](adversarial_loss=loss, spectral_norm=True, ema=0.5, **SMALL[name])
    named = step(system)
    assert all(torch.isfinite(value) for value in named.values())


@pytest.mark.parametrize("name", GANS)
def test_the_average_follows_the_generator(name):
    torch.manual_seed(0)
    system = SYSTEMS[name](ema=0.5, **SMALL[name])
    before = {key: value.clone() for key, value in system.generator.named_parameters()}
    step(system)
    now = dict(system.generator.named_parameters())
    close(
        {key: value.detach() for key, value in system.average.named_parameters()},
        {key: (before[key] + now[key].detach()) / 2 for key in before},
    )
    assert system.sampling_generator is system.average
    assert any(key.startswith("average.") for key in system.state_dict())


@pytest.mark.parametrize("name", ["infocapsgan", "infogan"])
def test_the_average_has_the_latest_statistics_of_batches(name):
    torch.manual_seed(0)
    system = SYSTEMS[name](ema=0.5, **SMALL[name])
    step(system)
    statistics = dict(system.generator.named_buffers())
    assert any(key.endswith("running_mean") and value.any() for key, value in statistics.items())
    close(dict(system.average.named_buffers()), statistics)


@pytest.mark.parametrize("kind", ["logistic", "hinge", "wasserstein"])
@pytest.mark.parametrize("name", GANS)
def test_the_adversarial_losses_are_of_the_kind_that_is_asked_for(name, kind):
    torch.manual_seed(0)
    system = SYSTEMS[name](adversarial_loss=kind, penalty_weight=7.0, **SMALL[name])
    real, generated = torch.rand(2, 8, 1, 28, 28)
    logits = torch.randn(2, 8)
    state = TrainState(system.optimizers, ShardedGenerator(0))
    wanted = losses.discriminator_loss(*logits, kind)
    if kind == "wasserstein":
        wanted = wanted + 7 * losses.gradient_penalty(system.logits, real, generated, ShardedGenerator(0))
    found = system.adversarial_discriminator_loss(real, generated, *logits, state)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        system.adversarial_generator_loss(logits[0]), losses.generator_loss(logits[0], kind)
    )


@pytest.mark.parametrize("name", GANS)
def test_spectral_norm_of_every_layer_of_the_discriminator(name):
    system = SYSTEMS[name](spectral_norm=True, **SMALL[name])
    layers = [x for x in system.discriminator.modules() if isinstance(x, (torch.nn.Conv2d, torch.nn.Linear))]
    assert layers
    assert all(torch.nn.utils.parametrize.is_parametrized(layer, "weight") for layer in layers)


def test_spectral_norm_of_the_discriminator_is_one():
    torch.manual_seed(0)
    system = DCGAN(spectral_norm=True, width=8, generator_width=8)
    for _ in range(50):
        weight = system.discriminator.layers[0].weight
    assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", GANS)
def test_a_step_of_the_generator_does_not_train_the_discriminator(name):
    # With no learning rate of its own the discriminator stays, whatever the generator does.
    torch.manual_seed(0)
    scheduled = {"discriminator_rate": 0.0, "classes_rate": 0.0}  # a step sets these rates anew
    known = {option: rate for option, rate in scheduled.items() if hasattr(SYSTEMS[name].Settings, option)}
    system = SYSTEMS[name](**SMALL[name], **known)
    for group in system.optimizers["discriminator"].param_groups:
        group["lr"] = 0.0
    own = [weight for group in system.optimizers["discriminator"].param_groups for weight in group["params"]]
    before = [weight.clone() for weight in own]
    step(system)
    assert all(torch.equal(a, b) for a, b in zip(before, own, strict=True))


def test_published_settings_of_capsulegan():
    settings = CapsuleGAN.defaults("published", "mnist")
    assert (settings.iterations, settings.learning_rate) == (5, 2e-4)
    assert (settings.batch_size, settings.generator, settings.width) == (16, "code", 256)


@pytest.mark.parametrize("system", [CapsuleGAN, DCGAN])
def test_what_was_published_as_epochs_are_steps(system):
    for dataset in ("mnist", "digits"):
        settings = system.defaults("published", dataset)
        assert (settings.max_steps, settings.evaluate_every, settings.log_every) == (10_000, 50, 1)
        assert settings.epochs >= settings.max_steps  # an epoch has a step at least


@pytest.mark.parametrize(("generator", "number"), [("code", 100), ("text", 28), ("capsule", 100)])
def test_latents_have_as_many_values_as_published_with_the_generator(generator, number):
    system = CapsuleGAN(generator=generator, width=8, generator_width=8)
    assert system.fixed_latents(3).shape == (3, number)
    assert system.generator(system.fixed_latents(3)).shape == (3, 1, 28, 28)


@pytest.mark.parametrize("name", GANS)
def test_a_penalty_and_compiled_networks_exclude_one_another(name):
    with pytest.raises(ValueError, match="--compile: cannot be combined with --adversarial-loss wasserstein"):
        SYSTEMS[name](adversarial_loss="wasserstein", compile=True)


@pytest.mark.parametrize("generator", ["code", "text", "capsule"])
def test_generators_of_capsulegan(generator):
    system = CapsuleGAN(generator=generator, noise_dim=28, width=8, generator_width=8)
    images = system.generator(torch.randn(2, 28))
    assert images.shape == (2, 1, 28, 28)
    assert images.abs().max() <= 1


def test_parameter_counts_by_hand():
    capsule = CapsuleGAN(recipe="published")
    # Conv(256, k7), 2,048 primary capsules (k7, s2), 2,048 · 10 · 16 · 8 transformations, dense 64, dense 1
    expected = 12_800 + (256 * 256 * 49 + 256) + 2_621_440 + (160 * 64 + 64) + 65
    assert parameter_count(capsule.discriminator) == expected
    # dense 100 → 128 · 7 · 7, Conv(128, k3), Conv(64, k3), Conv(1, k3)
    expected = 101 * 6272 + (128 * 128 * 9 + 128) + (128 * 64 * 9 + 64) + (64 * 9 + 1)
    assert parameter_count(capsule.generator) == expected
    # Conv(64), Conv(128), BN, Conv(256), BN, dense of 256 · 3 · 3
    expected = (16 * 64 + 64) + (64 * 128 * 16 + 128 + 256) + (128 * 256 * 16 + 256 + 512) + 2305
    assert parameter_count(DCGAN(recipe="published").discriminator) == expected
    text = CapsuleGAN(recipe="published", generator="text").generator
    expected = 29 * 1152 + (128 * 64 * 9 + 64) + (64 * 32 * 9 + 32) + (32 * 3 * 9 + 3) + (3 * 9 + 1)
    assert parameter_count(text) == expected


def test_mimic():
    assert parameter_count(Mimic(recipe="published").generator) == 8_057_985
    torch.manual_seed(0)
    system = Mimic(width=8, batch_size=8, noise_epochs=1)
    seen = []
    system.generator.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].clone()))
    last = []
    system.discriminator.register_forward_hook(lambda _, __, verdict: last.append(verdict.last.detach()))
    step(system, 2)  # an epoch of one step each
    assert not torch.equal(seen[0], last[0])
    assert torch.equal(seen[1], last[3])
    assert not seen[1].requires_grad


def test_the_squared_error_of_a_copy_is_that_of_pixels_from_0_to_1():
    copies = torch.zeros(2, 1, 3, 3)
    copies[0] = 1
    assert squared_error(copies, -torch.ones(2, 1, 3, 3)).item() == (9 + 9 / 4) / 2


@pytest.mark.parametrize("name", ["capsulegan", "dcgan", "mimic"])
def test_the_discriminator_is_measured_on_test_images(name, monkeypatch):
    system = SYSTEMS[name](**SMALL[name]).eval()
    monkeypatch.setattr(system, "logits", lambda images: images.mean(dim=(1, 2, 3)))
    if name == "mimic":
        monkeypatch.setattr(system, "copied", lambda images: -images)
    black, white = torch.zeros(4, 1, 28, 28).byte(), torch.full((4, 1, 28, 28), 255).byte()
    labels, mixed = torch.arange(4), torch.cat([white[:3], black[:1]])
    with torch.no_grad():
        metrics = system.evaluate(data.Dataset("black", black // 2, labels, mixed, labels))
    assert metrics["real_accuracy"] == 0.75
    if name == "mimic":
        assert (metrics["generated_accuracy"], metrics["squared_error"]) == (0.75, 784)


def test_the_line_between_two_latents():
    start, end = torch.zeros(2), torch.tensor([4.0, 8.0])
    assert morph(start, end, 5).tolist() == [[0, 0], [1, 2], [2, 4], [3, 6], [4, 8]]


@pytest.mark.parametrize("name", fast_only(["capsulegan"], ["mimic", "capsulegan"]))
def test_the_frechet_distance_of_a_training_is_that_of_its_evaluation(name, tmp_path, cache, monkeypatch):
    options = {"frechet_samples": 120, "max_steps": 2, "evaluate_every": 1, "out": tmp_path / "run"}
    train(SYSTEMS[name], SYSTEMS[name](device="cpu", **options, **SMALL[name]).settings)
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "evaluation"]
    assert len({row["frechet_distance"] for row in rows}) == 2
    found = evaluate(trained.load(tmp_path / "run", device="cpu"), ["generation"], samples=120)
    assert rows[-1]["frechet_distance"] == pytest.approx(found["metrics"]["frechet_distance"], rel=1e-6)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metrics"]["frechet_distance"] == rows[-1]["frechet_distance"]


def test_the_frechet_distance_needs_a_generator_and_enough_images():
    with pytest.raises(ValueError, match="--frechet-samples: got 99, takes 0 or at least 100"):
        DCGAN(frechet_samples=99)
    with pytest.raises(ValueError, match="--frechet-samples: takes 0 with --adversarial-weight 0"):
        SYSTEMS["infocapsgan"](frechet_samples=100, adversarial_weight=0.0)
