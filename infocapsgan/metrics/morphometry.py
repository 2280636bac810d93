"""Slant, breadth and width of the strokes of digits in images [N, 1, H, W] in [0, 1], bright on black."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

ENLARGED = 4  # so that strokes of two pixels have an inside


def slant(images: Tensor) -> Tensor:
    """How far a column leans to the right over a row's height: the tangent of the angle from upright, [N].

    −μ₁₁ / μ₀₂ with the central moments μ_pq = Σ (x − x̄)^p (y − ȳ)^q I(x, y), y growing downwards: the shear
    that would make the image upright. 0 where the image is empty.
    """
    _, xy, yy = _variances(images)
    return -xy / yy.clamp(min=1e-12)


def digit_width(images: Tensor) -> Tensor:
    """How wide a digit is, in pixels: the standard deviation of its bright pixels' columns, [N].

    √((μ₂₀ − μ₁₁² / μ₀₂) / μ₀₀), with the moments of slant(): what is left of the spread of the columns once
    the digit stands upright. 0 where the image is empty.
    """
    xx, xy, yy = _variances(images)
    return (xx - xy.square() / yy.clamp(min=1e-12)).clamp(min=0).sqrt()


def _variances(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """μ₂₀ / μ₀₀, μ₁₁ / μ₀₀ and μ₀₂ / μ₀₀ of each image [N]; 0 where it is empty."""
    mass = images[:, 0].double()
    mass = mass / mass.sum((1, 2), keepdim=True).clamp(min=1e-12)
    y, x = (torch.arange(size, dtype=mass.dtype, device=mass.device) for size in mass.shape[1:])
    y, x = (along - (mass * along).sum((1, 2), keepdim=True) for along in (y[:, None], x))
    xx, xy, yy = ((mass * product).sum((1, 2)) for product in (x * x, x * y, y * y))
    return xx, xy, yy


def stroke_width(images: Tensor) -> Tensor:
    """Mean width of the strokes in pixels, [N].

    4 Σ d / Σ 1 over the pixels brighter than half, d being a pixel's distance to the nearest dark one: across
    a stroke of width w, d rises from 0 to w/2 and falls again, w/4 in the mean. 0 where none is that bright.
    """
    large = F.interpolate(images.double(), scale_factor=ENLARGED, mode="bilinear", align_corners=False)
    inside = F.pad(large, [1, 1, 1, 1]).cpu().numpy()[:, 0] > 0.5
    # A pixel's own half is not part of the way to the border.
    distance = np.array([np.maximum(distance_transform_edt(image) - 0.5, 0).sum() for image in inside])
    count = np.maximum(inside.sum((1, 2)), 1)
    return images.new_tensor(4 / ENLARGED * distance / count)


MEASURES = {"slant": slant, "stroke_width": stroke_width, "digit_width": digit_width}
