"""The UCI handwritten digits that come with scikit-learn: 1,797 real images, no download."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from infocapsgan.data.dataset import Dataset
from infocapsgan.data.registry import ImageShape, register


@register("digits", ImageShape(1, 28, 10), rank=1)
def load(data_dir: str | Path | None = None) -> Dataset:
    """8 × 8 images enlarged to 28 × 28 (bilinear), 80 / 20, stratified with seed 0."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = F.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False).round().byte()
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return Dataset("digits", images[train], labels[train], images[test], labels[test])
