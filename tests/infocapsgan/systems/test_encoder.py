import pytest
import torch

from infocapsgan import data
from infocapsgan.data.augment import random_affine
from infocapsgan.data.dataset import to_symmetric
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.train_state import TrainState
from infocapsgan.systems import Encoder, InfoCapsGAN
from tests.parameters import parameter_count


def test_the_network_is_that_of_infocapsgan():
    for recipe in ("tuned", "published"):
        encoder, gan = Encoder(recipe=recipe).model, InfoCapsGAN(recipe=recipe).discriminator.encoder
        assert str(encoder) == str(gan)
    assert parameter_count(encoder) == 6_813_109 - 52 * 16 * 10 - 53


def test_the_validation_loss_is_the_margin_loss_of_the_images_held_out():
    digits = data.load("digits")
    system = Encoder(width=8, validation=True).eval()
    rest, held_out = digits.hold_out(system.validation_share)
    assert (len(rest.train_labels), len(held_out.test_labels)) == (1293, 144)
    with torch.no_grad():
        assert system.validation_loss(held_out) == system.evaluate(held_out)["margin_loss"]


def test_training_lowers_the_margin_loss():
    torch.manual_seed(0)
    digits = data.load("digits")
    system = Encoder(width=8, batch_size=32, moved=False)
    state = TrainState(system.optimizers, ShardedGenerator(0))
    rows = [system.step(digits.train_images[:32], digits.train_labels[:32], state) for _ in range(40)]
    assert rows[-1]["margin"] < 0.7 * rows[0]["margin"]


@pytest.mark.parametrize("copies", [False, True])
def test_moved_says_whether_copies_are_seen(copies):
    digits = data.load("digits")
    system, seen = Encoder(width=8, moved=copies), []
    system.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = digits.train_images[:8]
    system.step(images, digits.train_labels[:8], TrainState(system.optimizers, ShardedGenerator(0)))
    wanted = to_symmetric(images)
    assert torch.equal(
        seen[0], random_affine(wanted, ShardedGenerator(0), background=-1) if copies else wanted
    )
