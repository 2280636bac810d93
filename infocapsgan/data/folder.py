"""Any directory of images, with or without class folders."""

from collections import Counter
from pathlib import Path
from typing import TypeAlias

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from infocapsgan.data.dataset import DIGITS, Dataset
from infocapsgan.data.files import DataError
from infocapsgan.data.images import is_grey, read_image
from infocapsgan.data.registry import ImageShape, register

SIZE, SMALLEST, LARGEST = 32, 28, 128
SUFFIXES = ".bmp .gif .jfif .jpe .jpeg .jpg .pgm .png .ppm .tif .tiff .webp"
Labelled: TypeAlias = tuple[Path, int]  # an image and its label
Listing: TypeAlias = tuple[list[list[Labelled]], tuple[str, ...], ImageShape]


@register("folder", lambda *place: _listing(*place)[2], rank=7)
def load(data_dir: str | Path | None = None, image_size: int | None = None) -> Dataset:
    """The images in `data_dir` as square pictures of `image_size` pixels, 32 by default.

    `data_dir` holds images, or a folder of images for each class, or train/ and test/ with either. Without
    those two a fifth of the images (seed 0, the same share of each class) is the test split. Without class
    folders, or with one, every label is 0 and a class code has ten values. Names that begin with a dot are
    passed over, and so is what is no regular file. Each split is in a random order, the same at every call.
    The images have one channel where the headers of all say that they are grey, else three.
    """
    splits, names, (channels, size, _) = _listing(data_dir, image_size)
    if len(splits) == 2:
        orders = (torch.randperm(len(s), generator=torch.Generator().manual_seed(0)) for s in splits)
        train, test = ([s[i] for i in order.tolist()] for s, order in zip(splits, orders, strict=True))
    else:
        labels = [label for _, label in splits[0]]
        try:
            train, test = train_test_split(splits[0], test_size=0.2, random_state=0, stratify=labels)
        except ValueError as error:
            raise DataError(f"{data_dir} holds too few images to split them ({error})") from error
    parts = {"train": train, "test": test}
    split = {part: [path.relative_to(str(data_dir)).as_posix() for path, _ in parts[part]] for part in parts}
    tensors = *_read(train, channels, size), *_read(test, channels, size)
    return Dataset("folder", *tensors, size, names, split)


def _listing(data_dir: str | Path | None, image_size: int | None) -> Listing:
    """Training and test images, or all in one list where they are not apart; names of classes; the shape."""
    size = SIZE if image_size is None else image_size
    if type(size) is not int or size % 4 or not SMALLEST <= size <= LARGEST:
        raise ValueError(f"--image-size: got {size}, takes a multiple of 4 from {SMALLEST} to {LARGEST}")
    if data_dir is None or not Path(data_dir).is_dir():
        raise DataError(
            f"--data-dir: got {data_dir}, takes the directory of images of --dataset folder: where it is now"
        )
    root = Path(data_dir)
    train, test = root / "train", root / "test"
    if train.is_dir() != test.is_dir():
        takes = "takes both train and test, or neither and a folder for each class"
        raise DataError(f"{root} holds the folders {', '.join(_folders(root))}; --dataset folder {takes}")
    places = [train, test] if test.is_dir() else [root]
    names = _folders(places[0])
    if unknown := sorted(set(_folders(places[-1])) - set(names)):
        raise DataError(f"{test} holds classes that {train} lacks: {', '.join(unknown)}")
    splits, classes = [_images(place, names) for place in places], tuple(names) if len(names) > 1 else DIGITS
    grey = all(is_grey(path) for images in splits for path, _ in images)
    return splits, classes, ImageShape(1 if grey else 3, size, len(classes))


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path, names: list[str]) -> list[Labelled]:
    places = [(folder / name, label) for label, name in enumerate(names) if (folder / name).is_dir()]
    if names and not places:
        raise DataError(f"{folder} holds none of the class folders {', '.join(names)}")
    return [(path, label) for place, label in places or [(folder, 0)] for path in _images_below(place)]


def _images_below(place: Path) -> list[Path]:
    shown = (p for p in sorted(place.rglob("*")) if "/." not in f"/{p.relative_to(place).as_posix()}")
    files = [path for path in shown if path.is_file()]
    if images := [path for path in files if path.suffix.lower() in SUFFIXES.split()]:
        return images
    counts = Counter(path.suffix.lower() or "no suffix" for path in files)
    others = ", ".join(f"{suffix} ({number})" for suffix, number in sorted(counts.items())) or "nothing"
    raise DataError(f"{place} holds no images, which end in one of {SUFFIXES}; passed over: {others}")


def _read(images: list[Labelled], channels: int, size: int) -> tuple[Tensor, Tensor]:
    pixels = torch.stack([read_image(path, channels, size) for path, _ in images])
    return pixels, torch.tensor([label for _, label in images])
