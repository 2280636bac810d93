"""Every data set under its name; a module registers its own."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

from infocapsgan.data.dataset import Dataset

Loader = Callable[..., Dataset]


class ImageShape(NamedTuple):
    """What a model must know of a data set."""

    channels: int
    size: int  # height and width in pixels
    classes: int


Shape: TypeAlias = ImageShape | Callable[..., ImageShape]
_SETS: dict[str, tuple[Loader, Shape, int, int]] = {}


def register(name: str, shape: Shape, *, labels: int = 1, rank: int = 100) -> Callable[..., Loader]:
    """Decorator that makes a function the loader of the data set `name`.

    The function takes `data_dir`. Where the shape depends on the files, `shape` is a function, and both take
    `data_dir` and `image_size`. Each image has so many `labels`. Sets of lower rank come first in lists.
    """
    return lambda loader: _SETS.setdefault(name, (loader, shape, labels, rank))[0]


def names(*, labels: int | None = None) -> tuple[str, ...]:
    """The names of all data sets by rank, or of those whose images have so many labels."""
    ranked = sorted((rank, name) for name, (*_, number, rank) in _SETS.items() if labels in (None, number))
    return tuple(name for _, name in ranked)


def image_shape(
    name: str, data_dir: str | Path | None = None, *, image_size: int | None = None
) -> ImageShape:
    """Channels, size and classes of a data set, without reading its pixels; arguments as of load()."""
    _, shape = _find(name, image_size)
    return shape if isinstance(shape, ImageShape) else shape(data_dir, image_size)


def load(name: str, data_dir: str | Path | None = None, *, image_size: int | None = None) -> Dataset:
    """Reads a data set, and downloads it first where it is missing.

    Args:
        name: one of `NAMES`.
        data_dir: the folder that holds `mnist/` and its like; None looks in $INFOCAPSGAN_DATA, then in the
            user's cache folder. For `folder`, the directory of images.
        image_size: for `folder` only, height and width: a multiple of 4 from 28 to 128; None is 32.

    Raises:
        ValueError: no data set has that name, or the image size does not suit it.
        DataError: a file is damaged, or is missing and could not be downloaded.
    """
    loader, shape = _find(name, image_size)
    return loader(data_dir) if isinstance(shape, ImageShape) else loader(data_dir, image_size)


def _find(name: str, image_size: int | None) -> tuple[Loader, Shape]:
    if name not in _SETS:
        raise ValueError(f"dataset: got {name!r}, takes one of {', '.join(names())}")
    loader, shape, *_ = _SETS[name]
    if image_size is not None and isinstance(shape, ImageShape):
        raise ValueError(f"--image-size: got {image_size} with --dataset {name}, goes with --dataset folder")
    return loader, shape
