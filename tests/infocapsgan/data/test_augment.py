import torch

from infocapsgan.data.augment import (
    color_jitter,
    elastic_transform,
    random_affine,
    random_erasing,
    random_horizontal_flip,
    random_shift,
    shear,
    thicken,
)
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.metrics import morphometry as strokes


def test_no_movement_changes_nothing():
    images = torch.rand(4, 3, 9, 9)
    same = random_affine(images, ShardedGenerator(0), degrees=0, scale=0, shear=0, shift=0)
    torch.testing.assert_close(same, images)
    torch.testing.assert_close(random_shift(images, ShardedGenerator(0), 0), images)


def test_each_image_moves_by_itself_within_bounds():
    images = torch.zeros(64, 1, 11, 11)
    images[:, :, 5, 5] = 1
    places = random_shift(images, ShardedGenerator(0), 2).flatten(1).argmax(1)
    rows, columns = places // 11, places % 11
    assert set(rows.tolist()) == set(columns.tolist()) == {3, 4, 5, 6, 7}
    assert random_shift(images, ShardedGenerator(0), 2).sum() == 64


def test_a_shift_of_a_tenth_is_one_pixel_in_ten():
    images = torch.zeros(256, 1, 10, 10)
    images[:, :, 4:6, 4:6] = 1
    copies = random_affine(images, ShardedGenerator(0), degrees=0, scale=0, shear=0, shift=0.1)
    centre = (copies.sum(1) * torch.arange(10.0)[None, :, None]).sum((1, 2)) / copies.sum((1, 2, 3))
    assert 0.8 < (centre - 4.5).abs().max() <= 1.001


STILL = {"degrees": 0, "scale": 0, "shear": 0, "shift": 0}


def bars():
    """256 upright bars in the middle, 4 by 16 pixels."""
    images = torch.zeros(256, 1, 32, 32)
    images[:, :, 8:24, 14:18] = 1
    return images


def lean_of(images):
    """By how many columns a bar is further left in a row than in the one above it [B]."""
    place = torch.arange(32.0) - 15.5
    x, y = place[None, :], place[:, None]
    return -((images[:, 0] * x * y).sum((1, 2)) / (images[:, 0] * y**2).sum((1, 2)))


def test_turns_are_in_degrees():
    lean = lean_of(random_affine(bars(), ShardedGenerator(0), **STILL | {"degrees": 20}))
    assert 0.3 < lean.max() < 0.37  # tan 20° = 0.364
    assert -0.37 < lean.min() < -0.3


def test_sizes_change_by_their_share():
    size = random_affine(bars(), ShardedGenerator(0), **STILL | {"scale": 0.25}).sum((1, 2, 3)).sqrt() / 8
    assert 0.78 < size.min() < 0.84  # 1 / 1.25 = 0.8
    assert 1.28 < size.max() < 1.36  # 1 / 0.75 = 1.33


def test_shear_moves_rows_against_one_another():
    copies = random_affine(bars(), ShardedGenerator(0), **STILL | {"shear": 0.5})
    lean = lean_of(copies)
    assert 0.45 < lean.max() < 0.51
    assert -0.51 < lean.min() < -0.45
    torch.testing.assert_close(copies.sum(3), bars().sum(3))  # no row becomes longer or goes to another


def test_a_slant_is_a_shift_over_a_height():
    slant = torch.linspace(-0.4, 0.4, 5)
    tall = torch.zeros(5, 1, 24, 16)
    tall[:, :, 4:20, 6:10] = 1
    copies = shear(tall, slant)
    torch.testing.assert_close(strokes.slant(copies).float(), slant, atol=0.01, rtol=0)
    torch.testing.assert_close(copies.sum(3), tall.sum(3))
    torch.testing.assert_close(shear(tall, 0 * slant), tall)
    dark = torch.full((5, 1, 24, 16), -1.0)
    torch.testing.assert_close(shear(dark, slant, background=-1), dark)


def test_strokes_become_wider_and_narrower_by_pixels():
    images = torch.full((5, 1, 12, 12), -1.0)
    images[:, :, :, 4:8] = 1  # upright, four pixels wide, to the upper and the lower border
    copies = thicken(images, torch.tensor([-2.0, -1, 0, 1, 2]))
    across = torch.stack([copies[n, 0, row] for n in range(5) for row in (0, 6, 11)]).view(5, 3, 12)
    assert (across == across[:, :1]).all()
    assert ((across[:, 0] + 1) / 2).sum(1).tolist() == [2, 3, 4, 5, 6]
    assert across[1, 0, 3:9].tolist() == [-1, 0, 1, 1, 0, -1]
    assert across[3, 0, 2:10].tolist() == [-1, 0, 1, 1, 1, 1, 0, -1]


def test_the_background_comes_in_from_outside():
    images = torch.full((8, 1, 6, 6), -1.0)
    torch.testing.assert_close(random_affine(images, ShardedGenerator(0), background=-1), images)
    torch.testing.assert_close(random_shift(images, ShardedGenerator(0), 3, background=-1), images)


def test_one_rectangle_is_erased_from_each_image():
    images = torch.ones(256, 2, 20, 12)
    copies = random_erasing(images, ShardedGenerator(0), share=0.5, background=-1)
    gone = copies == -1
    assert torch.equal(gone[:, 0], gone[:, 1])
    assert ((copies == 1) | gone).all()
    rows, columns = gone[:, 0].any(2), gone[:, 0].any(1)
    assert torch.equal(gone[:, 0], rows[:, :, None] & columns[:, None, :])
    assert 8 <= rows.sum(1).max() <= 10
    assert 5 <= columns.sum(1).max() <= 6
    assert rows.any(0).all()
    assert columns.any(0).all()
    assert torch.equal(random_erasing(images, ShardedGenerator(0), share=0.0), images)


def test_half_of_the_images_are_mirrored():
    images = torch.rand(64, 1, 2, 3)
    copies = random_horizontal_flip(images, ShardedGenerator(0))
    mirrored = (copies == images.flip(3)).all(3).all(2).all(1)
    assert torch.equal(copies[~mirrored], images[~mirrored])
    assert 20 < mirrored.sum() < 44


def test_light():
    images = torch.rand(64, 3, 5, 5) * 0.2 + 0.4
    torch.testing.assert_close(color_jitter(images, ShardedGenerator(0), brightness=0, contrast=0), images)
    brighter = color_jitter(images, ShardedGenerator(0), brightness=0.1, contrast=0) - images
    torch.testing.assert_close(brighter, brighter[:, :1, :1, :1].expand_as(images))
    assert 0.09 < brighter.abs().max() <= 0.1001
    stronger = color_jitter(images, ShardedGenerator(0), brightness=0, contrast=0.5)
    torch.testing.assert_close(stronger.mean((2, 3)), images.mean((2, 3)))
    ratio = stronger.std((2, 3)) / images.std((2, 3))
    assert 0.5 <= ratio.min() < 0.6
    assert 1.4 < ratio.max() <= 1.5
    assert color_jitter(images, ShardedGenerator(0), brightness=1, contrast=0).max() == 1


def test_deformation_moves_pixels_by_its_strength():
    place = torch.arange(28.0).view(1, 1, 28, 1).expand(32, 1, 28, 28)
    torch.testing.assert_close(elastic_transform(place, ShardedGenerator(0), 0), place, atol=1e-4, rtol=0)
    moved_by = (elastic_transform(place, ShardedGenerator(0), 1.5) - place)[:, :, 7:21, 7:21]
    assert 1.3 < moved_by.square().mean().sqrt() < 1.7
    assert (moved_by[:, :, 1:] - moved_by[:, :, :-1]).abs().mean() < 0.5  # neighbours go together
