import torch

from infocapsgan.data import load
from infocapsgan.data.dataset import evenly, to_symmetric, to_unit


def test_images_are_taken_from_all_of_a_set():
    assert evenly(torch.arange(10), 4).tolist() == [0, 3, 6, 9]
    assert evenly(torch.arange(5), 5).tolist() == [0, 1, 2, 3, 4]


def test_a_public_set_has_no_paths():
    digits = load("digits")
    assert digits.class_names == tuple("0123456789")
    assert digits.split is digits.head(5).split is digits.hold_out(0.1)[0].split is None


def test_ranges_of_floats():
    pixels = torch.tensor([0.0, 0.2, 1.0])
    assert to_unit(pixels) is pixels
    torch.testing.assert_close(to_symmetric(pixels), torch.tensor([-1, -0.6, 1]))
    assert to_symmetric(pixels.half()).dtype == torch.float16


def test_uint8_and_floats_are_the_same_image():
    pixels = torch.arange(256).byte()
    torch.testing.assert_close(to_symmetric(to_unit(pixels)), to_symmetric(pixels))
