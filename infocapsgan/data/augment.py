"""Augmentation: randomly transformed copies of images [B, C, H, W], on their device.

Random numbers come from the argument `rng`; `background` is the value of what comes in from outside.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from infocapsgan.data.dataset import crop
from infocapsgan.engine.rng import ShardedGenerator

SMOOTHNESS = 4.0


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
    """Rotates, scales, shears and shifts each image, by amounts sampled uniformly for each.

    By up to `degrees` to either side, to 1 ± `scale` times the size, a row by `shear` times its distance from
    the row that stays, and by `shift` times the image's width and height.
    """
    B = len(images)
    angle, size, slant = (rng.uniform(B) * 2 - 1 for _ in range(3))
    angle, size, slant = angle * math.radians(degrees), 1 + size * scale, slant * shear
    cos, sin = size * angle.cos(), size * angle.sin()
    matrix = torch.stack([cos, slant - sin, sin, cos], dim=1)
    offset = (rng.uniform(B, 2) * 2 - 1) * (2 * shift)  # the grid runs from −1 to 1
    return _resample(images, torch.cat([matrix.view(B, 2, 2), offset[:, :, None]], dim=2), background)


def _resample(images: Tensor, matrix: Tensor, background: float) -> Tensor:
    """Images whose coordinates `matrix` [B, 2, 3] maps to those of the originals."""
    grid = F.affine_grid(matrix.to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images - background, grid, align_corners=False) + background


@record_function("augmentation")
def shear(images: Tensor, slant: Tensor, *, background: float = 0.0) -> Tensor:
    """Shears each image about its middle by `slant` [B], a row's shift to the right over its height there."""
    H, W = images.shape[2:]
    matrix = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
    matrix[:, 0, 1] = slant * H / W  # the grid runs from −1 to 1 along both sides, rows from the top
    return _resample(images, matrix, background)


@record_function("augmentation")
def thicken(images: Tensor, pixels: Tensor) -> Tensor:
    """Widens the bright strokes of each image by about `pixels` [B], from −2 to 2.

    Interpolates between the image and its dilation, or for negative numbers its erosion, by a cross of 3 × 3,
    which moves each border of a stroke by a pixel.
    """
    grown, shrunk = _dilated(images), -_dilated(-images)
    share = (pixels / 2).view(-1, 1, 1, 1)
    return images + share.clamp(min=0) * (grown - images) + share.clamp(max=0) * (images - shrunk)


def _dilated(images: Tensor) -> Tensor:
    return torch.maximum(*(F.max_pool2d(images, (h, w), 1, (h // 2, w // 2)) for h, w in ((3, 1), (1, 3))))


@record_function("augmentation")
def random_erasing(images: Tensor, rng: ShardedGenerator, *, share: float, background: float = 0.0) -> Tensor:
    """Fills one rectangle of each image with background (Zhong et al. 2017, random erasing).

    Its height and width are uniform from 0 to `share` of the image's, its centre uniform in the image.
    """
    near = []
    for side in images.shape[2:]:
        centre, reach = side * rng.uniform(len(images), 1), 0.5 * share * side * rng.uniform(len(images), 1)
        near.append((torch.arange(side, device=images.device) + 0.5 - centre).abs() < reach)
    rows, columns = near
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], background)


@record_function("augmentation")
def random_shift(images: Tensor, rng: ShardedGenerator, pixels: int, background: float = 0.0) -> Tensor:
    """Shifts each image by a whole number of pixels, up to `pixels`, along each axis."""
    padded = F.pad(images, [pixels] * 4, value=background)
    return crop(padded, rng.integers(2 * pixels + 1, len(images), 2), images.shape[-1])


@record_function("augmentation")
def random_horizontal_flip(images: Tensor, rng: ShardedGenerator) -> Tensor:
    """Mirrors each image left to right with probability ½."""
    mirrored = rng.integers(2, len(images)).bool()[:, None, None, None]
    return torch.where(mirrored, images.flip(3), images)


@record_function("augmentation")
def color_jitter(images: Tensor, rng: ShardedGenerator, *, brightness: float, contrast: float) -> Tensor:
    """Adds up to ± `brightness` to each image in [0, 1] and multiplies its contrast by 1 ± `contrast`.

    Contrast is relative to the mean of each channel; what leaves [0, 1] is clipped.
    """
    change = rng.uniform(len(images), 2, 1, 1, 1) * 2 - 1
    mean = images.mean(dim=(2, 3), keepdim=True)
    images = mean + (images - mean) * (1 + contrast * change[:, 0])
    return (images + brightness * change[:, 1]).clamp(0, 1)


@record_function("augmentation")
def elastic_transform(images: Tensor, rng: ShardedGenerator, strength: float) -> Tensor:
    """Displaces the pixels of each image by a smooth random field (Simard, Steinkraus, Platt 2003).

    `strength` is the root mean square of a displacement along an axis, in pixels; a Gaussian with a standard
    deviation of SMOOTHNESS pixels smooths the field.
    """
    B, _, H, W = images.shape
    reach = math.ceil(3 * SMOOTHNESS)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=images.device) / SMOOTHNESS) ** 2)
    kernel = kernel / kernel.norm()  # unit variance in, unit variance out
    field = rng.normal(B * 2, 1, H + 2 * reach, W + 2 * reach)
    field = F.conv2d(F.conv2d(field, kernel[None, None, :, None]), kernel[None, None, None, :])
    # grid_sample takes (column, row) in units in which the image is 2 wide and 2 high.
    scale = torch.tensor([2 / W, 2 / H], device=images.device)
    identity = torch.eye(2, 3, device=images.device).expand(B, 2, 3)
    grid = F.affine_grid(identity, list(images.shape), align_corners=False)
    grid = grid + strength * scale * field.view(B, 2, H, W).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid.to(images.dtype), align_corners=False)
