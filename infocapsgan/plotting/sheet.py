"""What a sheet of images shows, without the library that draws it."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Sheet(NamedTuple):
    """Rows of images with their labels."""

    images: Tensor
    """[N, C, H, W] in [0, 1], row by row; a last row may be shorter."""
    columns: int
    """How many images are in a row."""
    rows: Sequence[str] = ()
    """What each row is."""
    heads: Sequence[str] = ()
    """What each column is."""
    captions: Sequence[str] = ()
    """What stands above each image."""
    xlabel: str = ""
    """What the columns stand for."""
    ylabel: str = ""
    """What the rows stand for."""
