"""Moved and deformed copies of images, in batches, on the device that holds them."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from infocapsgan.data.dataset import crop
from infocapsgan.engine.rng import ShardedGenerator


@record_function("augmentation")
def random_affine(
    images: Tensor,
    rng: ShardedGenerator,
    *,
    degrees: float = 20.0,
    scale: float = 0.25,
    shear: float = 0.5,
    shift: float = 0.1,
    background: float = 0.0,
) -> Tensor:
    """A turned, scaled, sheared and shifted copy of each image, each by an amount of its own.

    Args:
        images: [B, C, H, W].
        rng: where the random numbers come from.
        degrees: largest turn to either side.
        scale: largest relative change of the size.
        shear: largest shift of a row against one that is as far away.
        shift: largest shift, as a part of the image's width or height.
        background: the value of what comes in from outside.
    """
    B = len(images)
    turn, size, lean = (rng.uniform(B) * 2 - 1 for _ in range(3))
    turn, size, lean = turn * math.radians(degrees), 1 + size * scale, lean * shear
    matrix = torch.stack(
        [size * turn.cos(), lean - size * turn.sin(), size * turn.sin(), size * turn.cos()], dim=1
    )
    offset = (rng.uniform(B, 2) * 2 - 1) * (2 * shift)  # the grid runs from −1 to 1
    return _mapped(images, torch.cat([matrix.view(B, 2, 2), offset[:, :, None]], dim=2), background)


def _mapped(images: Tensor, matrix: Tensor, background: float) -> Tensor:
    """Images [B, C, H, W] whose places are taken to those of the originals by `matrix` [B, 2, 3]."""
    grid = F.affine_grid(matrix.to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images - background, grid, align_corners=False) + background


@record_function("augmentation")
def shear(images: Tensor, slant: Tensor, *, background: float = 0.0) -> Tensor:
    """Each image [B, C, H, W] sheared about its middle, to the right where `slant` [B] is above 0.

    Args:
        images: what is sheared.
        slant: a row's shift over its height above the middle: what strokes.slant then finds more.
        background: the value of what comes in from outside.
    """
    H, W = images.shape[2:]
    matrix = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
    matrix[:, 0, 1] = slant * H / W  # the grid runs from −1 to 1 along both sides, rows from the top
    return _mapped(images, matrix, background)


@record_function("augmentation")
def thicken(images: Tensor, pixels: Tensor) -> Tensor:
    """Each image [B, C, H, W] with bright strokes that are wider by about `pixels` [B], from −2 to 2.

    Between the image and its dilation, or for negative numbers its erosion, by a cross of 3 × 3, which moves
    each border of a stroke by a pixel. Strokes that are as thin as what is taken from them vanish.
    """
    grown = functools.reduce(torch.maximum, _neighbours(images, -math.inf))
    shrunk = functools.reduce(torch.minimum, _neighbours(images, math.inf))
    share = (pixels / 2).view(-1, 1, 1, 1)
    return images + share.clamp(min=0) * (grown - images) + share.clamp(max=0) * (images - shrunk)


def _neighbours(images: Tensor, outside: float) -> list[Tensor]:
    """Each pixel itself, and those above, below, left and right of it."""
    padded = F.pad(images, [1, 1, 1, 1], value=outside)
    H, W = images.shape[2:]
    return [padded[:, :, y : y + H, x : x + W] for y, x in ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))]


@record_function("augmentation")
def random_erasing(images: Tensor, rng: ShardedGenerator, *, share: float, background: float = 0.0) -> Tensor:
    """Each image [B, C, H, W] with one rectangle of background in it (Zhong et al. 2017, random erasing).

    Its height and width are each drawn from 0 to `share` of the image's; its centre is anywhere in the image.
    """
    near = []
    for side in images.shape[2:]:
        centre, reach = side * rng.uniform(len(images)), 0.5 * share * side * rng.uniform(len(images))
        place = torch.arange(side, device=images.device) + 0.5
        near.append((place - centre[:, None]).abs() < reach[:, None])
    rows, columns = near
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], background)


@record_function("augmentation")
def random_shift(images: Tensor, rng: ShardedGenerator, pixels: int, background: float = 0.0) -> Tensor:
    """Each image [B, C, H, W] moved by a whole number of pixels, up to `pixels`, along each axis."""
    padded = F.pad(images, [pixels] * 4, value=background)
    return crop(padded, rng.integers(2 * pixels + 1, len(images), 2), images.shape[-1])


@record_function("augmentation")
def random_horizontal_flip(images: Tensor, rng: ShardedGenerator) -> Tensor:
    """Each image [B, C, H, W] mirrored left to right, or not, with probability ½."""
    mirrored = rng.integers(2, len(images)).bool()[:, None, None, None]
    return torch.where(mirrored, images.flip(3), images)


@record_function("augmentation")
def color_jitter(images: Tensor, rng: ShardedGenerator, *, brightness: float, contrast: float) -> Tensor:
    """Each image in [0, 1] brighter or darker by up to `brightness`, its contrast times 1 ± `contrast`.

    Contrast is taken about the mean of each channel; what leaves [0, 1] is clipped.
    """
    change = rng.uniform(len(images), 2, 1, 1, 1) * 2 - 1
    mean = images.mean(dim=(2, 3), keepdim=True)
    images = mean + (images - mean) * (1 + contrast * change[:, 0])
    return (images + brightness * change[:, 1]).clamp(0, 1)


@record_function("augmentation")
def elastic_transform(
    images: Tensor, rng: ShardedGenerator, strength: float, *, smoothness: float = 4.0
) -> Tensor:
    """Elastic deformation: pixels are displaced by a smooth random field (Simard, Steinkraus, Platt 2003).

    Args:
        images: [B, C, H, W].
        rng: where the fields come from.
        strength: root mean square of a displacement along an axis, in pixels.
        smoothness: standard deviation of the Gaussian that smooths the field, in pixels.
    """
    B, _, H, W = images.shape
    reach = math.ceil(3 * smoothness)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=images.device) / smoothness) ** 2)
    kernel = kernel / kernel.norm()  # unit variance in, unit variance out
    field = rng.normal(B * 2, 1, H + 2 * reach, W + 2 * reach)
    field = F.conv2d(F.conv2d(field, kernel[None, None, :, None]), kernel[None, None, None, :])
    # grid_sample takes (column, row) in units in which the image is 2 wide and 2 high.
    scale = torch.tensor([2 / W, 2 / H], device=images.device)
    still = torch.eye(2, 3, device=images.device).expand(B, 2, 3)
    grid = F.affine_grid(still, list(images.shape), align_corners=False)
    grid = grid + strength * scale * field.view(B, 2, H, W).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid.to(images.dtype), align_corners=False)
