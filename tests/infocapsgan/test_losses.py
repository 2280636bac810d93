import math

import pytest
import torch

from infocapsgan import losses
from infocapsgan.engine.rng import ShardedGenerator


def test_margin_loss_by_hand():
    lengths = torch.tensor([[0.9, 0.1], [0.5, 0.5], [1.0, 0.0]])
    target = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    expected = torch.tensor([0, 0.4**2 + 0.5 * 0.4**2, 0.9**2 + 0.5 * 0.9**2])
    torch.testing.assert_close(losses.margin_loss(lengths, target), expected)


def test_margin_loss_of_two_present_classes():
    lengths, target = torch.tensor([[0.9, 0.7, 0.3]]), torch.tensor([[1.0, 1, 0]])
    torch.testing.assert_close(losses.margin_loss(lengths, target), torch.tensor([0.2**2 + 0.5 * 0.2**2]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_margin_loss_of_labels_where_there_are_as_many_as_classes(dtype):
    lengths, labels = torch.rand(4, 4), torch.tensor([3, 1, 0, 2])
    wanted = torch.tensor([0.8915, 0.4855, 0.4156, 0.4573])
    for target in (labels, torch.eye(4)[labels], torch.eye(4, dtype=torch.bool)[labels]):
        target = target.to(dtype) if target is labels else target
        torch.testing.assert_close(losses.margin_loss(lengths, target), wanted, atol=1e-4, rtol=0)
    one_hot = torch.eye(4, dtype=dtype)[labels]
    torch.testing.assert_close(losses.margin_loss(lengths, one_hot), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(3), r"target: got torch.float32 of shape \[3\], takes classes as integers \[3\], or a "),
        (torch.zeros(3, dtype=torch.bool), "target: got torch.bool"),
        (torch.zeros(2, dtype=torch.int64), r"target: .* of shape \[2\]"),
        (torch.zeros(3, 1), r"target: .* of shape \[3, 1\]"),
        (torch.zeros(1, 4), r"target: .* of shape \[1, 4\]"),
        (torch.zeros(()), r"target: .* of shape \[\]"),
        (torch.tensor([0, 1, 4]), r"target: got \[0, 1, 4\], takes classes from 0 to 3"),
        (torch.tensor([0, -1, 2]), r"target: got \[0, -1, 2\], takes classes from 0 to 3"),
    ],
)
def test_margin_loss_of_what_is_no_target(target, message):
    with pytest.raises(ValueError, match=message):
        losses.margin_loss(torch.rand(3, 4), target)


def test_adversarial_losses_by_hand():
    zero, large = torch.zeros(3), torch.full((3,), 100.0)
    assert losses.discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert losses.discriminator_loss(large, -large).item() == pytest.approx(0)
    assert losses.discriminator_loss(-large, large).item() == 200
    assert losses.generator_loss(zero).item() == pytest.approx(math.log(2))
    assert losses.generator_loss(-large).item() == 100


def test_mode_seeking_is_the_ratio_of_mean_distances_of_neighbours():
    images, latents = torch.rand(5, 1, 2, 2), torch.rand(5, 3)  # the fifth has no neighbour
    far = [(x[0] - x[1]).abs().mean() + (x[2] - x[3]).abs().mean() for x in (images, latents)]
    assert losses.mode_seeking(images, latents).item() == pytest.approx((far[1] / far[0]).item(), rel=1e-3)
    assert losses.mode_seeking(torch.zeros(4, 1, 2, 2), latents[:4]).item() == pytest.approx(1e5)


def test_mode_seeking_of_parts_is_that_of_the_whole():
    # Each of two processes has half of the images; gradients are averaged.
    bright, latents = torch.tensor([1.0, 1.0, 9.0, 9.0]), torch.rand(4, 3)
    images = (torch.rand(4, 5) * bright[:, None]).requires_grad_()
    whole = losses.mode_seeking(images, latents)
    (wanted,) = torch.autograd.grad(whole, images)

    found = torch.zeros_like(images)
    for half in (slice(0, 2), slice(2, 4)):
        means = iter([(x[1::2] - x[::2]).abs().mean().detach() for x in (images, latents)])

        def mean(local, means=means):
            return local + (next(means) - local).detach()

        part = losses.mode_seeking(images[half], latents[half], mean=mean)
        torch.testing.assert_close(part, whole)
        found += torch.autograd.grad(part, images)[0] / 2
    torch.testing.assert_close(found, wanted)


def test_mutual_information_of_certain_and_even_predictions_is_log_of_the_classes():
    assert losses.mutual_information(torch.eye(4)).item() == pytest.approx(math.log(4))
    assert losses.mutual_information(torch.full((5, 4), 0.25)).item() == pytest.approx(0, abs=1e-6)
    one_class = torch.eye(4)[[0, 0, 0]]
    assert losses.mutual_information(one_class).item() == 0
    assert losses.mutual_information(torch.eye(4), balance=3).item() == pytest.approx(3 * math.log(4))


def test_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert losses.divergence(p, q.log()).item() == pytest.approx((first + math.log(2)) / 2)
    assert losses.divergence(q, q.log()).item() == pytest.approx(0, abs=1e-7)


def test_the_adversarial_direction_is_the_one_that_matters():
    # Only pixel 0 decides, so the worst change of length r changes that pixel by r.
    def log_prediction(images):
        return torch.log_softmax(torch.stack([images[:, 0, 0, 0], -images[:, 0, 0, 0]], dim=1), dim=1)

    images = torch.full((2, 1, 1, 3), 0.1)
    p = log_prediction(images).exp()
    found = losses.adversarial_smoothness(log_prediction, images, p, ShardedGenerator(0), radius=0.5)
    changed = [
        losses.divergence(p, log_prediction(images + sign * torch.tensor([0.5, 0, 0]))) for sign in (1, -1)
    ]
    assert min(changed) <= found <= max(changed)


def test_hinge_and_wasserstein_by_hand():
    real, generated = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0])
    assert losses.discriminator_loss(real, generated, "hinge").item() == 0.5 + 1
    assert losses.discriminator_loss(real, generated, "wasserstein").item() == -0.5 - 1
    for kind in ("hinge", "wasserstein"):
        assert losses.generator_loss(generated, kind).item() == 0.5
    for call in (
        lambda: losses.discriminator_loss(real, generated, "x"),
        lambda: losses.generator_loss(real, "x"),
    ):
        with pytest.raises(ValueError, match="kind: got 'x', takes logistic, hinge or wasserstein"):
            call()


def test_gradient_penalty_of_a_plane():
    images = torch.rand(3, 1, 2, 2)
    slope = torch.tensor([[1.0, 2], [2, 0]])

    def discriminate(x):
        return (x * slope).sum((1, 2, 3))

    assert losses.gradient_penalty(
        discriminate, images, images + 1, ShardedGenerator(0)
    ).item() == pytest.approx(4)


def test_the_penalty_is_taken_between_real_and_generated_images():
    """The gradient of ‖x‖² / 2 is x itself."""
    real, generated = torch.rand(3, 1, 2, 2), 5 + torch.rand(3, 1, 2, 2)
    place = ShardedGenerator(0).uniform(3, 1, 1, 1)
    between = place * real + (1 - place) * generated
    wanted = (between.flatten(1).norm(dim=1) - 1).square().mean()
    found = losses.gradient_penalty(
        lambda x: x.square().sum((1, 2, 3)) / 2, real, generated, ShardedGenerator(0)
    )
    torch.testing.assert_close(found, wanted)
