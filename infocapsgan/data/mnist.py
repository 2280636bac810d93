"""MNIST and Fashion-MNIST: four files in the idx format each."""

from pathlib import Path

import numpy as np
from torch import Tensor

from infocapsgan.data.dataset import Dataset
from infocapsgan.data.files import DataError, File, Source, find, unpacked, values
from infocapsgan.data.registry import ImageShape, register

SHAPE = ImageShape(1, 28, 10)
KINDS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
# Checksums of the content: the same set is published in differently compressed files.
MNIST_SUMS = (
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)
FASHION_SUMS = (
    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
)
FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
CLOTHES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def _source(folder: str, torchvision: str, url: str, checksums: tuple[str, ...]) -> Source:
    files = (File(f"{kind}-ubyte.gz", checksum) for kind, checksum in zip(KINDS, checksums, strict=True))
    return Source(folder, url, tuple(files), (torchvision,))


MNIST = _source("mnist", "MNIST/raw", "https://ossci-datasets.s3.amazonaws.com/mnist/", MNIST_SUMS)
FASHION_MNIST = _source("fashion-mnist", "FashionMNIST/raw", FASHION_URL, FASHION_SUMS)


@register("mnist", SHAPE, rank=2)
def load_mnist(data_dir: str | Path | None = None) -> Dataset:
    """60,000 training images and 10,000 test images [1, 28, 28] of digits."""
    return Dataset("mnist", *_read(MNIST, data_dir))


@register("fashion-mnist", SHAPE, rank=3)
def load_fashion_mnist(data_dir: str | Path | None = None) -> Dataset:
    """As load_mnist; the classes are ten kinds of clothes."""
    return Dataset("fashion-mnist", *_read(FASHION_MNIST, data_dir), class_names=CLOTHES)


def _read(source: Source, data_dir: str | Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    train_images, train_labels, test_images, test_labels = (read_idx(path) for path in find(source, data_dir))
    return train_images[:, None], train_labels.long(), test_images[:, None], test_labels.long()


def read_idx(path: Path) -> Tensor:
    """A file in the idx format, gz or not → a uint8 tensor.

    The format: two zero bytes, one byte for the type (8: unsigned byte), one byte for the number of axes,
    each axis as a big-endian 32-bit number, then the values, last axis fastest.
    """
    content = unpacked(path)
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is not an idx file of unsigned bytes: it begins with {content[:4].hex(' ')}")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(f"{path} ends after {len(content)} bytes where its header says {content[3]} axes")
    return values(path, content[start:], np.frombuffer(content[4:start], dtype=">u4").tolist(), "u1")
