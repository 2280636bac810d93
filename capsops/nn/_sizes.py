"""Sizes of layers as users pass them."""

from capsops import functional


def check_size(name: str, value: int, least: int = 1) -> int:
    """A size of a layer: an int of `least` or more."""
    size = functional.as_int(name, value)
    if size < least:
        raise ValueError(f"{name}: got {size}, takes {least} or more")
    return size


def check_sizes(name: str, value: int | tuple[int, int], least: int = 1) -> tuple[int, int]:
    """A size for the height and one for the width; an int is both."""
    if not isinstance(value, (tuple, list)):
        value = value, value
    if len(value) != 2:
        raise ValueError(f"{name}: got {value!r}, takes an int, or two: height and width")
    return check_size(name, value[0], least), check_size(name, value[1], least)
