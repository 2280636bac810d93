"""smallNORB: toys of five kinds, photographed by two cameras; the published split by instance."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from infocapsgan.data.dataset import Dataset
from infocapsgan.data.files import DataError, File, Source, find, unpacked, values
from infocapsgan.data.registry import ImageShape, register

SIZE = 48  # of 96 × 96, resized as published; batches are cropped from it
BYTES, INTEGERS = 0x1E3D4C55, 0x1E3D4C54

FILES = (
    File("smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat.gz", "8138a0902307b32dfa0025a36dfa45ec", "md5"),
    File("smallnorb-5x46789x9x18x6x2x96x96-training-cat.mat.gz", "fd5120d3f770ad57ebe620eb61a0b633", "md5"),
    File("smallnorb-5x01235x9x18x6x2x96x96-testing-dat.mat.gz", "e9920b7f7b2869a8f1a12e945b2c166c", "md5"),
    File("smallnorb-5x01235x9x18x6x2x96x96-testing-cat.mat.gz", "fd5120d3f770ad57ebe620eb61a0b633", "md5"),
)
SMALLNORB = Source("smallnorb", "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/", FILES)
TOYS = ("animal", "human", "plane", "truck", "car")


@register("smallnorb", ImageShape(1, 32, 5), rank=5)
def load(data_dir: str | Path | None = None) -> Dataset:
    """48,600 training images [1, 48, 48] of both cameras and as many test images, for crops of 32 × 32."""
    images, labels, test_images, test_labels = (read_matrix(path) for path in find(SMALLNORB, data_dir))
    test = _flat(test_images, test_labels)
    return Dataset("smallnorb", *_flat(images, labels), *test, size=32, class_names=TOYS)


def read_matrix(path: Path) -> Tensor:
    """A file of smallNORB's binary format → a tensor of bytes or 32-bit integers.

    The format, little-endian: a number for the type of the values, the number of axes, each axis (at least
    three numbers are there), then the values, last axis fastest.
    """
    content = unpacked(path)
    header = np.frombuffer(content[:8], dtype="<i4") if len(content) >= 8 else [0, 0]
    dtype = {BYTES: "u1", INTEGERS: "<i4"}.get(int(header[0]))
    if dtype is None:
        raise DataError(f"{path} is not a matrix of bytes or integers: it begins with {content[:4].hex(' ')}")
    axes = int(header[1])
    shape = np.frombuffer(content[8 : 8 + 4 * axes], dtype="<i4").tolist()
    return values(path, content[8 + 4 * max(3, axes) :], shape, dtype)


def _flat(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of images [N, 2, 96, 96] → images of 48 × 48 [2 N, 1, 48, 48], each labelled as its pair."""
    parts = (part.flatten(0, 1)[:, None].float() for part in images.split(1000))
    resized = [F.interpolate(part, size=(SIZE, SIZE), mode="area").round().byte() for part in parts]
    return torch.cat(resized), labels.long().repeat_interleave(images.shape[1])
