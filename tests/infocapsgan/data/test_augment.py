import torch

from infocapsgan.data.augment import moved, shifted
from infocapsgan.draw import Draw


def test_no_movement_changes_nothing():
    images = torch.rand(4, 3, 9, 9)
    same = moved(images, Draw(0), degrees=0, scale=0, shear=0, shift=0)
    torch.testing.assert_close(same, images)
    torch.testing.assert_close(shifted(images, Draw(0), 0), images)


def test_each_image_moves_by_itself_within_bounds():
    images = torch.zeros(64, 1, 11, 11)
    images[:, :, 5, 5] = 1
    places = shifted(images, Draw(0), 2).flatten(1).argmax(1)
    rows, columns = places // 11, places % 11
    assert set(rows.tolist()) == set(columns.tolist()) == {3, 4, 5, 6, 7}
    assert shifted(images, Draw(0), 2).sum() == 64


def test_a_shift_of_a_tenth_is_one_pixel_in_ten():
    images = torch.zeros(256, 1, 10, 10)
    images[:, :, 4:6, 4:6] = 1
    copies = moved(images, Draw(0), degrees=0, scale=0, shear=0, shift=0.1)
    centre = (copies.sum(1) * torch.arange(10.0)[None, :, None]).sum((1, 2)) / copies.sum((1, 2, 3))
    assert 0.8 < (centre - 4.5).abs().max() <= 1.001


def test_the_background_comes_in_from_outside():
    images = torch.full((8, 1, 6, 6), -1.0)
    torch.testing.assert_close(moved(images, Draw(0), background=-1), images)
    torch.testing.assert_close(shifted(images, Draw(0), 3, background=-1), images)
