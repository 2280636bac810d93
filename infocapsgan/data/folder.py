"""Any directory of images, with or without class folders."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from sklearn.model_selection import train_test_split
from torch import Tensor

from infocapsgan.data.files import DataError

SIZE = 32
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
CLASSES_WITHOUT_FOLDERS = 10


def load(data_dir: str | Path | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images as 3 × 32 × 32, the middle square resized: train images and labels, test images and labels.

    `data_dir` holds images, or a folder of images for each class, or train/ and test/ with either. Without
    those two a fifth of the images (seed 0, the same share of each class) is the test split. Without class
    folders, or with one, every label is 0 and a class code has ten values; metrics against labels then mean
    nothing. Names that begin with a dot are passed over. Each split is in an order of chance, the same at
    every call: its first images are a fair sample of it. Grey images may have 16 bits a pixel.

    Raises:
        DataError: there is no such folder, no image in it, or one cannot be read or has pixels of 32 bits;
            train/ or test/ is there without the other, or test/ has a class that train/ lacks.
    """
    root = _root(data_dir)
    train, test = _splits(root)
    names = class_names(train)
    if test:
        if unknown := sorted(set(class_names(test)) - set(names)):
            raise DataError(f"{test} holds classes that {train} lacks: {', '.join(unknown)}")
        return *_read(_shuffled(_images(train, names))), *_read(_shuffled(_images(test, names)))
    images, labels = _read(_images(root, names))
    try:
        train, test = train_test_split(
            np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels.numpy()
        )
    except ValueError as error:
        raise DataError(f"{root} holds too few images for a train and a test split ({error})") from error
    return images[train], labels[train], images[test], labels[test]


def classes(data_dir: str | Path | None) -> int:
    """How many classes the directory has, read from its folders alone."""
    return len(label_names(data_dir)) or CLASSES_WITHOUT_FOLDERS


def label_names(data_dir: str | Path | None) -> list[str]:
    """The names of its class folders, in the order of their labels; none where there are not two of them."""
    names = class_names(_splits(_root(data_dir))[0])
    return names if len(names) > 1 else []


def class_names(folder: Path) -> list[str]:
    """The folders in `folder`, in the order of their labels."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _root(data_dir: str | Path | None) -> Path:
    if data_dir is None or not Path(data_dir).is_dir():
        raise DataError(f"--data-dir: got {data_dir}, takes the directory of images for --dataset folder")
    return Path(data_dir)


def _splits(root: Path) -> tuple[Path, Path | None]:
    """The folders of training and test images; `root` and None where it holds one set of images."""
    train, test = root / "train", root / "test"
    if train.is_dir() != test.is_dir():
        raise DataError(
            f"{root} holds the folders {', '.join(class_names(root))}; --dataset folder takes both "
            "train and test, or neither and a folder for each class"
        )
    return (train, test) if test.is_dir() else (root, None)


def _images(folder: Path, names: list[str]) -> list[tuple[Path, int]]:
    places = [(folder / name, label) for label, name in enumerate(names)] or [(folder, 0)]
    found = [
        (path, label)
        for place, label in places
        for path in sorted(place.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(place).parts)
    ]
    if not found:
        raise DataError(f"{folder} holds no images; they end in one of {', '.join(SUFFIXES)}")
    return found


def _shuffled(found: list[tuple[Path, int]]) -> list[tuple[Path, int]]:
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return [found[i] for i in order.tolist()]


def _read(found: list[tuple[Path, int]]) -> tuple[Tensor, Tensor]:
    images = torch.stack([_pixels(path) for path, _ in found])
    return images, torch.tensor([label for _, label in found])


def _pixels(path: Path) -> Tensor:
    try:
        image = _eight_bits(Image.open(path), path).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path} cannot be read as an image ({error})") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((SIZE, SIZE), box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """Pillow cuts larger values off at 255 where it is left to convert them."""
    # By its version Pillow has grey images of 16 bits as I;16, or as I with the format alone to tell.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(f"{path} has pixels of 32 bits (mode {image.mode}); takes 8 or 16")
    return image
