import pytest
import torch

from infocapsgan.data import Dataset, image_shape, load
from infocapsgan.data.dataset import to_symmetric, to_unit


def test_the_split_is_fixed_and_stratified():
    digits = load("digits")
    assert digits.train_images.shape == (1437, 1, 28, 28)
    assert digits.test_images.shape == (360, 1, 28, 28)
    assert digits.train_images.dtype == torch.uint8
    assert digits.train_images.max() == 255
    assert digits.test_labels.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert torch.equal(digits.train_images, load("digits").train_images)


def test_head():
    head = load("digits").head(5)
    assert [len(part) for part in (head.train_images, head.train_labels, head.test_images)] == [5, 5, 5]
    assert isinstance(head, Dataset)


def test_hold_out():
    digits = load("digits")
    rest, held_out = digits.hold_out(0.1)
    assert (len(rest.train_labels), len(held_out.test_labels)) == (1293, 144)
    assert torch.equal(rest.test_images, digits.test_images)
    together = torch.cat([rest.train_images, held_out.test_images]).flatten(1).double().sum(1)
    assert torch.equal(together.sort()[0], digits.train_images.flatten(1).double().sum(1).sort()[0])
    assert torch.equal(held_out.test_images, digits.hold_out(0.1)[1].test_images)
    with pytest.raises(ValueError, match="share: got 0, takes a share"):
        digits.hold_out(0)


def test_ranges():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(to_unit(pixels), torch.tensor([0, 0.2, 1]))
    torch.testing.assert_close(to_symmetric(pixels), torch.tensor([-1, -0.6, 1]))


def test_an_unknown_set():
    assert image_shape("digits") == (1, 28, 10)
    with pytest.raises(ValueError, match="dataset: got 'letters', takes one of digits, mnist"):
        load("letters")
