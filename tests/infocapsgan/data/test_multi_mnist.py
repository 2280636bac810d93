import pytest
import torch

from infocapsgan.data import image_shape, multi_mnist
from infocapsgan.data.dataset import to_unit
from infocapsgan.data.multi_mnist import ByClass, labels_of, of_digits, overlay, render, sample_pairs
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.train_state import TrainState
from infocapsgan.systems import CapsNet


@pytest.fixture
def digits():
    """Forty small pictures: a digit of class c is one pixel of brightness 10 (c + 1) in the middle."""
    labels = torch.arange(10).repeat(4)
    images = torch.zeros(40, 1, 28, 28, dtype=torch.uint8)
    images[:, 0, 14, 14] = (10 * (labels + 1)).byte()
    return images, labels


def paired(images, labels, first, rng):
    pairs = sample_pairs(labels, ByClass(labels), first, rng)
    return render(images, pairs), labels_of(labels, pairs)


def test_a_pair_is_two_digits_of_different_classes(digits):
    images, labels = digits
    pairs, both = paired(images, labels, torch.arange(40).repeat(50), ShardedGenerator(0))
    assert pairs.shape == (2000, 2, 36, 36)
    assert torch.equal(both[:, 0], labels.repeat(50))
    assert (both[:, 0] != both[:, 1]).all()
    assert both[:, 1].bincount().min() > 120
    assert torch.equal(pairs.flatten(2).max(2).values, (10 * (both + 1)).byte())


def test_each_digit_is_moved_by_up_to_four_pixels(digits):
    pairs, _ = paired(*digits, torch.arange(40).repeat(50), ShardedGenerator(0))
    places = pairs.flatten(0, 1).flatten(1).max(1).indices
    rows, columns = places // 36 - 18, places % 36 - 18
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(-4, 5))


def test_test_pairs_are_always_the_same(digits):
    first, second = (of_digits(*digits, *digits, 100) for _ in range(2))
    assert torch.equal(first.test_images, second.test_images)
    assert torch.equal(first.test_labels, second.test_labels)
    assert first.test_labels[:, 0].bincount().tolist() == [10] * 10


def test_training_pairs_are_sampled_anew(digits):
    dataset, rng = of_digits(*digits, *digits, 10), ShardedGenerator(0)
    first, second = (dataset.train_batch(torch.arange(40), rng) for _ in range(2))
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    assert torch.equal(first[1][:, 0], second[1][:, 0])
    again = dataset.train_batch(torch.arange(40), ShardedGenerator(0))
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_pairs_beyond_those_stored_are_rendered_when_they_are_used(digits, monkeypatch):
    whole = of_digits(*digits, *digits, 50)
    assert whole.pairs is None
    monkeypatch.setattr(multi_mnist, "STORED", 20)
    dataset = of_digits(*digits, *digits, 50)
    assert dataset.test_images.shape == (20, 2, 36, 36)
    for size in (7, 50):
        images, labels = (torch.cat(parts) for parts in zip(*dataset.test_batches(size), strict=True))
        assert torch.equal(images, whole.test_images)
        assert torch.equal(labels, whole.test_labels)
    assert torch.equal(dataset.test_labels, whole.test_labels)
    head = dataset.head(30)
    assert sum(len(images) for images, _ in head.test_batches(8)) == 20
    more = dataset.with_test_pairs(60)
    assert torch.equal(more.test_labels[:50], dataset.test_labels)


def test_capsnet_is_measured_on_all_test_pairs(digits, monkeypatch):
    torch.manual_seed(0)
    system = CapsNet(dataset="multi-mnist", width=8, test_pairs=30).eval()
    measured = []
    for stored in (30, 8):
        monkeypatch.setattr(multi_mnist, "STORED", stored)
        monkeypatch.setattr("infocapsgan.data.load", lambda *_, **options: of_digits(*digits, *digits, 4))
        with torch.no_grad():
            measured.append(system.evaluate(system.load_data()))
    assert measured[0] == measured[1]
    assert measured[0]["accuracy"] * 60 == pytest.approx(round(measured[0]["accuracy"] * 60))
    assert measured[0]["pair_error"] * 30 == pytest.approx(round(measured[0]["pair_error"] * 30))


def test_each_digit_is_rebuilt_by_itself(digits):
    torch.manual_seed(0)
    system = CapsNet(dataset="multi-mnist", width=8).eval()
    pairs, labels = next(of_digits(*digits, *digits, 6).test_batches(6))
    pairs = to_unit(pairs)
    capsules = torch.rand(6, 10, 16)
    error = system.reconstruction_error(capsules, labels, pairs, "squared")
    of_each = [
        system.reconstruction_error(capsules, labels[:, digit], pairs[:, digit, None], "squared")
        for digit in (0, 1)
    ]
    torch.testing.assert_close(error, sum(of_each) / 2)


def test_digits_are_added_and_clipped():
    pair = torch.tensor([[[[0.25, 0.75]], [[0.5, 0.75]]]])
    assert overlay(pair).tolist() == [[[[0.75, 1.0]]]]


def test_capsnet_trains_on_pairs_and_tells_both_digits(digits):
    torch.manual_seed(0)
    dataset = of_digits(*digits, *digits, 20)
    system = CapsNet(dataset="multi-mnist", width=8, batch_size=8)
    assert image_shape("multi-mnist") == (1, 36, 10)
    state = TrainState(system.optimizers, ShardedGenerator(0))
    images, labels = dataset.train_batch(torch.arange(8), state.rng)
    named = system.step(images, labels, state)
    assert all(torch.isfinite(value) for value in named.values())
    system.eval()
    with torch.no_grad():
        metrics = system.evaluate(dataset)
        sheet = system.pictures(dataset)["reconstructions"]
    assert metrics["pair_error"] >= 1 - metrics["accuracy"]
    assert sheet.images.shape == (50, 1, 36, 36)
    assert sheet.columns == 10
    rest, held_out = dataset.hold_out(0.25)
    assert (len(rest.train_labels), held_out.test_images.shape) == (30, (10, 2, 36, 36))


def test_the_two_longest_capsules_come_in_the_order_of_the_labels():
    capsules = torch.zeros(3, 10, 16)
    capsules[:, [4, 7], 0] = torch.tensor([0.9, 0.8])
    labels = torch.tensor([[4, 7], [7, 4], [1, 4]])
    predicted = CapsNet(dataset="multi-mnist", width=8).predicted(capsules, labels)
    assert predicted.tolist() == [[4, 7], [7, 4], [7, 4]]
    assert (predicted == labels).tolist() == [[True, True], [True, True], [False, True]]
