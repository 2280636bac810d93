"""Tile sizes by shape class: a small table, chosen by counting registers and bytes; nothing is tried at call time.

benchmarks/triton_resources.py prints what the compiler makes of each entry, benchmarks/triton_tiles.py measures
other entries on a given GPU.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class Capsules(NamedTuple):
    """How a tile holds output capsules: `parts` of them (powers of two) of `dim` components, `tiles` times."""

    parts: tuple[int, ...]
    dim: int
    tiles: int
    exact: bool

    def options(self) -> dict[str, object]:
        return {"PARTS": self.parts, "DP": self.dim, "EXACT": self.exact}

    @property
    def columns(self) -> int:
        return sum(self.parts) * self.dim


# Columns (output capsules × components) of a tile that holds all j, and of one of several tiles.
_COLUMNS, _COLUMNS_OF_MANY = 256, 128


@lru_cache(maxsize=256)
def capsules(J: int, D: int) -> Capsules:
    """All j in one or two parts where they fit one tile, else equal tiles."""
    DP = power_of_2(D)
    if J * DP > _COLUMNS and J > 1:
        part = max(1, _COLUMNS_OF_MANY // DP)
        return Capsules((part,), DP, ceil_div(J, part), D == DP and J % part == 0)
    least = max(1, 16 // DP)  # columns of a matrix unit
    first = power_of_2(J + 1) // 2
    if first < least:
        parts = (least,)
    else:
        rest = J - first
        parts = (first, max(power_of_2(rest), least)) if rest else (first,)
        if len(parts) == 2 and parts[1] == first:
            parts = (2 * first,)
    return Capsules(parts, DP, 1, D == DP and sum(parts) == J)


def depth(K: int) -> int:
    """K as a matrix unit takes it: at least 16."""
    return max(16, power_of_2(K))


@lru_cache(maxsize=16)
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _wanted(x: Tensor) -> int:
    """Programs that fill the device; for tensors that are not on a GPU those of an H100."""
    return 4 * (_processors(x.device.index) if x.device.type == "cuda" else 132)


class Split(NamedTuple):
    """A sum cut into `count` runs of `size` terms, the last one shorter."""

    count: int
    size: int


def split(terms: int, programs: int, x: Tensor, multiple: int = 1) -> Split:
    """Runs for a sum of `terms` that `programs` programs make side by side, so that the device is full."""
    count = max(1, min(_wanted(x) // programs, ceil_div(terms, multiple)))
    size = ceil_div(ceil_div(terms, count), multiple) * multiple
    return Split(ceil_div(terms, size), size)


class Product(NamedTuple):
    """A tile of a plain product."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Tile(NamedTuple):
    """Samples of a tile, warps of a program, stages of its loads."""

    rows: int
    warps: int
    stages: int


def _rows(B: int, most: int) -> int:
    return max(16, min(power_of_2(B), most))


def uniform_pass(B: int, columns: int, inputs: int, x: Tensor) -> Product:
    rows = _rows(B, 64)
    wide = min(max(power_of_2(columns), 16), 128)
    deep = min(max(power_of_2(inputs), 16), 128 // x.element_size())
    return Product(rows, wide, deep, 4, 3)


def routed_pass(B: int, columns: int, gradient: bool) -> Tile:
    """A thread holds V, û and the sums, each rows · columns / threads numbers; backward ∂s as well."""
    rows = _rows(B, 32)
    held = 20 if gradient else 40
    return Tile(rows, max(1, min(8, power_of_2(rows * columns // (32 * held)))), 2)


def gradient(B: int, columns: int) -> Tile:
    """A thread holds û, ∂û, V and ∂s, each rows · columns / threads numbers."""
    rows = _rows(B, 32)
    return Tile(rows, max(1, min(8, power_of_2(rows * columns // (32 * 20)))), 2)
