import pytest
import torch

from infocapsgan.data import image_shape
from infocapsgan.data.multi_mnist import MultiMNIST, fixed_pairs, overlaid, paired
from infocapsgan.draw import Draw
from infocapsgan.systems import CapsNet
from infocapsgan.training import Training


@pytest.fixture
def digits():
    """Forty small pictures: a digit of class c is one pixel of brightness 10 (c + 1) in the middle."""
    labels = torch.arange(10).repeat(4)
    images = torch.zeros(40, 1, 28, 28, dtype=torch.uint8)
    images[:, 0, 14, 14] = (10 * (labels + 1)).byte()
    return images, labels


def test_a_pair_is_two_digits_of_different_classes(digits):
    images, labels = digits
    pairs, both = paired(images, labels, torch.arange(40).repeat(50), Draw(0))
    assert pairs.shape == (2000, 2, 36, 36)
    assert torch.equal(both[:, 0], labels.repeat(50))
    assert (both[:, 0] != both[:, 1]).all()
    assert both[:, 1].bincount().min() > 120
    assert torch.equal(pairs.flatten(2).max(2).values, (10 * (both + 1)).byte())


def test_each_digit_is_moved_by_up_to_four_pixels(digits):
    pairs, _ = paired(*digits, torch.arange(40).repeat(50), Draw(0))
    places = pairs.flatten(0, 1).flatten(1).max(1).indices
    rows, columns = places // 36 - 18, places % 36 - 18
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(-4, 5))


def test_test_pairs_are_always_the_same(digits):
    first, second = fixed_pairs(*digits, 100), fixed_pairs(*digits, 100)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert first[1][:, 0].bincount().tolist() == [10] * 10


def test_digits_are_added_and_clipped():
    pair = torch.tensor([[[[0.25, 0.75]], [[0.5, 0.75]]]])
    assert overlaid(pair).tolist() == [[[[0.75, 1.0]]]]


def test_capsnet_trains_on_pairs_and_tells_both_digits(digits):
    torch.manual_seed(0)
    pairs, both = fixed_pairs(*digits, 20)
    dataset = MultiMNIST("multi-mnist", *digits, pairs, both, size=36)
    system = CapsNet(dataset="multi-mnist", width=8, batch_size=8)
    assert image_shape("multi-mnist") == (1, 36, 10)
    training = Training(system.optimizers, Draw(0))
    images, labels = dataset.train_batch(torch.arange(8), training.draw)
    named = system.step(images, labels, training)
    assert all(torch.isfinite(value) for value in named.values())
    system.eval()
    with torch.no_grad():
        metrics = system.evaluate(dataset)
        pictures, columns = system.pictures(dataset)["reconstructions"]
    assert metrics["pair_error"] >= 1 - metrics["accuracy"]
    assert pictures.shape == (50, 1, 36, 36)
    assert columns == 10
    rest, held_out = dataset.hold_out(0.25)
    assert (len(rest.train_labels), held_out.test_images.shape) == (30, (10, 2, 36, 36))


def test_the_two_longest_capsules_come_in_the_order_of_the_labels():
    capsules = torch.zeros(3, 10, 16)
    capsules[:, [4, 7], 0] = torch.tensor([0.9, 0.8])
    labels = torch.tensor([[4, 7], [7, 4], [1, 4]])
    predicted = CapsNet(dataset="multi-mnist", width=8).predicted(capsules, labels)
    assert predicted.tolist() == [[4, 7], [7, 4], [7, 4]]
    assert (predicted == labels).tolist() == [[True, True], [True, True], [False, True]]
