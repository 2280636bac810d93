"""What a sheet of images shows, without the library that draws it."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Sheet(NamedTuple):
    """Rows of images with their labels."""

    images: Tensor  # [N, C, H, W] in [0, 1], row by row; a last row may be shorter
    columns: int  # how many images are in a row
    rows: Sequence[str] = ()  # what each row is
    heads: Sequence[str] = ()  # what each column is
    xlabel: str = ""  # what the columns stand for
    ylabel: str = ""  # what the rows stand for
    captions: Sequence[str] = ()  # what stands above each image
