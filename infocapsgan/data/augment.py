"""Moved and deformed copies of images, in batches, on the device that holds them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from infocapsgan.data.dataset import cropped
from infocapsgan.draw import Draw


def moved(
    images: Tensor,
    draw: Draw,
    *,
    degrees: float = 15.0,
    scale: float = 0.15,
    shear: float = 0.2,
    shift: float = 0.1,
    background: float = 0.0,
) -> Tensor:
    """A turned, scaled, sheared and shifted copy of each image, each by an amount of its own.

    Args:
        images: [B, C, H, W].
        draw: where the random numbers come from.
        degrees: largest turn to either side.
        scale: largest relative change of the size.
        shear: largest shift of a row against one that is as far away.
        shift: largest shift, as a part of the image's width or height.
        background: the value of what comes in from outside.
    """
    B = len(images)
    turn, size, lean = (draw.uniform(B) * 2 - 1 for _ in range(3))
    turn, size, lean = turn * math.radians(degrees), 1 + size * scale, lean * shear
    matrix = torch.stack(
        [size * turn.cos(), lean - size * turn.sin(), size * turn.sin(), size * turn.cos()], dim=1
    )
    offset = (draw.uniform(B, 2) * 2 - 1) * (2 * shift)  # the grid runs from −1 to 1
    grid = F.affine_grid(
        torch.cat([matrix.view(B, 2, 2), offset[:, :, None]], dim=2).to(images.dtype),
        list(images.shape),
        align_corners=False,
    )
    return F.grid_sample(images - background, grid, align_corners=False) + background


def shifted(images: Tensor, draw: Draw, pixels: int, background: float = 0.0) -> Tensor:
    """Each image [B, C, H, W] moved by a whole number of pixels, up to `pixels`, along each axis."""
    padded = F.pad(images, [pixels] * 4, value=background)
    return cropped(padded, draw.integers(2 * pixels + 1, len(images), 2), images.shape[-1])
