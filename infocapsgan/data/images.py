"""Pictures that a user brings - files, PIL images, arrays, tensors - as pixels of one shape.

The same rules hold for all of them, and for the images that a system was trained on:

- A file's EXIF orientation is applied.
- Transparency is composited on black, which is also the ground that augmentation moves images in.
- Grey becomes three equal channels where the shape has three, and colour its luminance where it has one.
- The middle square is cut out and resized, bicubic.
- Grey files may have 16 bits a pixel; pixels of 32 bits are refused.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from infocapsgan.data.dataset import to_unit
from infocapsgan.data.files import DataError
from infocapsgan.data.registry import ImageShape

Picture: TypeAlias = Tensor | np.ndarray | Image.Image | str | Path
TAKES = "uint8, or floats in [0, 1]"


def read_image(path: str | Path, channels: int, size: int) -> Tensor:
    """The picture in a file as uint8 [channels, size, size]; raises DataError where no decoder takes it."""
    with _opened(path) as image:
        return _pixels(image, channels, size)


def is_grey(path: str | Path) -> bool:
    """Whether a file's header says that it has grey levels and no colours: Pillow's modes 1, L, LA, I;16."""
    with _opened(path) as image:
        return image.mode in ("1", "L", "LA") or _has_16_bits(image)


def to_images(images: Picture | Sequence[Picture], shape: ImageShape) -> Tensor:
    """Pictures of any kind → [N, channels, size, size] of `shape`, as uint8 or float32 in [0, 1].

    Args:
        images: paths, PIL images, or tensors and arrays, uint8 or of floats in [0, 1]: [H, W] grey,
            [C, H, W] or [H, W, C], [N, C, H, W] or [N, H, W, C]; one or a sequence. Which axis is C is told
            by its size of 1 or 3; where it could be either, it is refused. Pixels of the right shape stay as
            they are; others become uint8.
        shape: what a model takes.

    Raises:
        TypeError: pictures of another type, or values of another type than uint8 or floats.
        ValueError: an array of another shape or with values outside [0, 1] or NaN; no picture at all.
        DataError: a file that cannot be read.
    """
    if isinstance(images, str | Path):
        return read_image(images, shape.channels, shape.size)[None]
    if isinstance(images, Image.Image):
        return _pixels(images, shape.channels, shape.size)[None]
    if isinstance(images, Tensor | np.ndarray):
        return _from_arrays(images, shape.channels, shape.size)
    if not isinstance(images, Sequence):
        got = type(images).__name__
        raise TypeError(f"images: got {got}, takes tensors, arrays, PIL images, paths or lists of them")
    if not images:
        raise ValueError("images: got an empty sequence, takes at least one picture")
    parts = [to_images(one, shape) for one in images]
    return torch.cat([to_unit(part) for part in parts] if any(map(torch.is_floating_point, parts)) else parts)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """The picture in a file, its header read; whatever a decoder raises in the block becomes a DataError."""
    if not Path(path).is_file():  # to open a named pipe would wait for ever
        raise DataError(f"{path} cannot be read as an image (it is no file)")
    try:
        with warnings.catch_warnings():
            # One for each large file; those that are too large raise an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except Exception as error:
        raise DataError(f"{path} cannot be read as an image ({error})") from error


def _pixels(image: Image.Image, channels: int, size: int) -> Tensor:
    deep = _has_16_bits(image)
    image = ImageOps.exif_transpose(image)
    if deep:  # Pillow would cut values off at 255
        values = np.asarray(image)
        if "transparency" in image.info:  # the grey level that is transparent
            values = np.where(values == image.info["transparency"], 0, values)
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"it has pixels of 32 bits (mode {image.mode}); takes 8 or 16 bits")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    image = image.convert("RGB" if channels == 3 else "L")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((size, size), box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).view(size, size, channels).permute(2, 0, 1)


def _has_16_bits(image: Image.Image) -> bool:
    # By its version Pillow has grey images of 16 bits as I;16, or as I with the format as the only sign.
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _from_arrays(images: Tensor | np.ndarray, channels: int, size: int) -> Tensor:
    if isinstance(images, np.ndarray):
        dtype = np.float32 if images.dtype.kind == "f" else images.dtype
        images = torch.from_numpy(np.array(images, dtype, order="C"))
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images: got values of {images.dtype}, takes {TAKES}")
    shape = tuple(images.shape)
    images = images[(None,) * (4 - images.ndim)] if images.ndim in (2, 3) else images
    channel_axes = [axis for axis in (1, 3) if images.ndim == 4 and images.shape[axis] in (1, 3)]
    if len(channel_axes) != 1 or not images.numel():
        takes = (
            "[H, W], [C, H, W], [H, W, C], [N, C, H, W] or [N, H, W, C] with C of 1 or 3, and no other axis"
        )
        raise ValueError(f"images: got an array of shape {shape}, takes {takes} that C could be")
    if images.is_floating_point():
        images = images.detach().float()
        low, high = (value.item() for value in images.aminmax())
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise ValueError(f"images: got floats from {low:g} to {high:g}, takes {TAKES}")
    images = images.movedim(channel_axes[0], 1)
    if images.shape[1:] == (channels, size, size):
        return images
    if images.is_floating_point():
        images = (images * 255).round().byte()
    arrays = images.movedim(1, 3).squeeze(3).cpu().numpy()  # Pillow takes grey ones without an axis for C
    fitted = [_pixels(Image.fromarray(array), channels, size) for array in arrays]
    return torch.stack(fitted).to(images.device)
