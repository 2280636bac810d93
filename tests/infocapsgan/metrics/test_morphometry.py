import math

import pytest
import torch

from infocapsgan.metrics.morphometry import digit_width, slant, stroke_width


def bar(width, lean=0.0, size=28):
    """A bar that is `width` pixels wide and leans to the right; pixels are as bright as it covers them."""
    fine = 16
    y, x = torch.meshgrid(*[(torch.arange(size * fine) + 0.5) / fine - size / 2] * 2, indexing="ij")
    inside = ((x + lean * y).abs() < width / 2) & (y.abs() < 9)
    return inside.float().view(1, size, fine, size, fine).mean((2, 4))[None]


@pytest.mark.parametrize("lean", [-0.7, 0.0, 0.4])
def test_slant_of_a_bar(lean):
    assert slant(bar(2.5, lean)).item() == pytest.approx(lean, abs=0.01)


@pytest.mark.parametrize("width", [2, 3, 4.5, 6])
def test_width_of_a_bar(width):
    # The ends of the bar shorten the way to the border: by about width / (3 · length) of it.
    assert stroke_width(bar(width)).item() == pytest.approx(width * (1 - width / 54), abs=0.2)


def test_the_width_of_a_leaning_bar_is_taken_across_it():
    lean = 0.5
    across = 4 / math.sqrt(1 + lean**2)
    assert stroke_width(bar(4, lean)).item() == pytest.approx(across * (1 - across / 60), abs=0.3)


@pytest.mark.parametrize("lean", [-0.7, 0.0, 0.4])
@pytest.mark.parametrize("width", [4, 9])
def test_how_wide_a_bar_is_however_it_leans(width, lean):
    # That of a uniform distribution; a pixel's own width is neglected.
    assert digit_width(bar(width, lean)).item() == pytest.approx(width / math.sqrt(12), abs=0.1)


def test_the_width_of_a_digit_is_not_that_of_its_strokes():
    one, two = bar(2), bar(2).roll(8, dims=3) + bar(2).roll(-8, dims=3)
    assert stroke_width(two).item() == pytest.approx(stroke_width(one).item())
    assert digit_width(two).item() == pytest.approx(8, rel=0.01)


def test_an_empty_image():
    empty = torch.zeros(2, 1, 28, 28)
    assert digit_width(empty).tolist() == [0, 0]
    assert slant(empty).tolist() == [0, 0]
    assert stroke_width(empty).tolist() == [0, 0]
