"""The data sets there are."""

from pathlib import Path
from typing import NamedTuple

from infocapsgan.data import cifar10, digits, folder, mnist, multi_mnist, smallnorb
from infocapsgan.data.dataset import Dataset


class ImageShape(NamedTuple):
    """What a model must know of a data set."""

    channels: int
    size: int  # height and width in pixels
    classes: int


_SETS = {
    "digits": (ImageShape(1, 28, 10), digits.load),
    "mnist": (ImageShape(1, 28, 10), mnist.load_mnist),
    "fashion-mnist": (ImageShape(1, 28, 10), mnist.load_fashion_mnist),
    "cifar10": (ImageShape(3, 32, 10), cifar10.load),
    "smallnorb": (ImageShape(1, 32, 5), smallnorb.load),
    "multi-mnist": (ImageShape(1, multi_mnist.SIZE, 10), multi_mnist.load),
    "folder": (ImageShape(3, folder.SIZE, folder.CLASSES_WITHOUT_FOLDERS), folder.load),
}
NAMES = tuple(_SETS)
SINGLE_NAMES = tuple(name for name in NAMES if name != "multi-mnist")
"""Those whose images have one label each."""


def image_shape(
    name: str, data_dir: str | Path | None = None, *, image_size: int | None = None
) -> ImageShape:
    """Channels, size and classes of the data set `name`, known before its files are read."""
    shape = _find(name)[0]
    return shape._replace(classes=folder.classes(data_dir)) if name == "folder" else shape


def load(name: str, data_dir: str | Path | None = None, *, image_size: int | None = None) -> Dataset:
    """Reads a data set, and downloads it first where it is missing.

    Args:
        name: one of `NAMES`.
        data_dir: the folder that holds `mnist/` and its like; None looks in $INFOCAPSGAN_DATA, then in the
            user's cache folder.

    Raises:
        ValueError: no data set has that name.
        DataError: a file is damaged, or is missing and could not be downloaded.
    """
    shape, read = _find(name)
    found = read(data_dir)
    return found if isinstance(found, Dataset) else Dataset(name, *found, size=shape.size)


def _find(name: str):
    if name not in _SETS:
        raise ValueError(f"dataset: got {name!r}, takes one of {', '.join(NAMES)}")
    return _SETS[name]
