"""Launch configurations by shape class: small tables, chosen by counting; nothing is tuned at call time.

benchmarks/triton_resources.py prints what the compiler makes of them, benchmarks/triton_tiles.py times others
on a GPU.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


def all_registers() -> dict[str, int]:
    """The option that lets ptxas, which is NVIDIA's, use all registers of a thread.

    By itself it may spill some so that one more program fits.
    """
    return {} if torch.version.hip is not None else {"maxnreg": 255}


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@lru_cache(maxsize=16)
def _processors_of(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _processors(x: Tensor) -> int:
    """Multiprocessors of the device; an H100's for tensors without memory, a few for the interpreter."""
    if x.device.type == "cuda":
        return _processors_of(x.device.index)
    return 132 if x.device.type == "meta" else 2


class Split(NamedTuple):
    """A sum divided into `number` parts of `size` terms, the last of which may be shorter."""

    number: int
    size: int


def busy(programs: int, size: int, processors: int, resident: int) -> float:
    """How long the busiest multiprocessor works, in terms: `programs` programs of `size` terms each.

    The mean of two limits. Where programs wait for memory, a wave of `resident` to a multiprocessor takes as
    long as `resident` terms after one another, however full it is; where they wait for one another, what
    counts is how many a multiprocessor has in all. On an H200, B = 128, TF32, 288 programs of one block took
    114 µs in a forward pass where 144 of blocks twice as large took 137, two to a multiprocessor either way.
    """
    waves = ceil_div(programs, processors * resident)
    return size * (waves * resident + ceil_div(programs, processors)) / 2


@lru_cache(maxsize=1024)
def _split(terms: int, side_by_side: int, processors: int, resident: int, most: int) -> Split:
    """The parts that keep the busiest multiprocessor busy for the shortest time; of those the fewest."""
    sizes = dict.fromkeys(ceil_div(terms, count) for count in range(1, most + 1))
    splits = [Split(ceil_div(terms, size), size) for size in sizes]
    return min(splits, key=lambda x: busy(side_by_side * x.number, x.size, processors, resident))


def split(
    terms: int, side_by_side: int, x: Tensor, resident: int, multiple: int = 1, least: int = 1, waves: int = 2
) -> Split:
    """How to divide sums of `terms`, of which `side_by_side` are computed at once, to fill the device.

    A multiprocessor has room for `resident` programs. A part has a multiple of `multiple` terms, and `least`
    or more. Where there is more than one part, there are no more programs than in `waves` full waves.
    """
    processors = _processors(x)
    most = min(waves * processors * resident // side_by_side, ceil_div(terms, multiple), terms // least)
    parts = _split(ceil_div(terms, multiple), side_by_side, processors, resident, max(1, most))
    return Split(parts.number, parts.size * multiple)


def _block(n: int, most: int, least: int = 16) -> int:
    """A block for n: a power of two, at least what a matrix unit takes."""
    return max(least, min(power_of_2(n), most))


# Programs of a product of 4 warps that a multiprocessor has room for.
_RESIDENT = 3


class Product(NamedTuple):
    """A plain product [row_tiles · rows, column_tiles · columns], its terms in parts of steps · depth."""

    rows: int
    columns: int
    depth: int
    row_tiles: int
    column_tiles: int
    parts: int
    steps: int
    warps: int = 4
    stages: int = 3

    @property
    def programs(self) -> int:
        return self.row_tiles * self.column_tiles * self.parts

    def options(self) -> dict[str, int]:
        return {
            "R": self.rows, "C": self.columns, "Q": self.depth, "num_warps": self.warps,
            "num_stages": self.stages,
        }  # fmt: skip


def product(rows: int, columns: int, terms: int, x: Tensor) -> Product:
    R, C, Q = _block(rows, 64), _block(columns, 64), _block(terms, 128 // x.element_size())
    row_tiles, column_tiles = ceil_div(rows, R), ceil_div(columns, C)
    parts = split(ceil_div(terms, Q), row_tiles * column_tiles, x, _RESIDENT)
    return Product(R, C, Q, row_tiles, column_tiles, parts.number, parts.size)


class Tile(NamedTuple):
    """A block of a routed pass: samples, input capsules, components of an output and of an input capsule."""

    rows: int
    inputs: int
    outputs: int
    depth: int
    warps: int
    stages: int
    registers: int | None
    resident: int  # programs that a multiprocessor has room for

    def options(self) -> dict[str, int]:
        options = {
            "R": self.rows, "C": self.inputs, "DB": self.outputs, "KB": self.depth, "num_warps": self.warps,
            "num_stages": self.stages,
        }  # fmt: skip
        return options if self.registers is None else {**options, "maxnreg": self.registers}


class Entry(NamedTuple):
    """The largest block of a shape class.

    Samples; numbers of u of one sample (input capsules × components); components of an output capsule; warps;
    stages; programs that a multiprocessor has room for; registers of a thread, where ptxas by itself takes
    other numbers than those that make this room, or spills.

    A multiprocessor has 65,536 registers (compute capabilities 8.0, 9.0 and 10.0): at 255 of a thread 8
    warps, at 168 12 warps. benchmarks/triton_resources.py prints how many programs there is room for.
    """

    rows: int
    numbers: int
    outputs: int
    warps: int
    stages: int
    resident: int
    registers: int | None = None


# By the unit that makes the products: multiply-adds for IEEE float32, else the matrix unit. "Long or odd" are
# vectors of more than 16 numbers, which may take several blocks, and those that are loaded number by number,
# an address each. "K = 8" is float32 or bfloat16: with 168 registers other lengths, and float16, spill.
# Without spills on sm_90.
ROUTED = {
    "ieee": Entry(32, 64, 32, 4, 2, 2),
    "ieee, few samples": Entry(16, 32, 32, 2, 2, 4),
    "ieee, long or odd": Entry(16, 32, 32, 4, 1, 2, 255),
    "tf32": Entry(64, 64, 32, 4, 1, 2),
    "tf32, K = 8": Entry(64, 64, 32, 4, 1, 3, 168),
    "tf32, few samples": Entry(16, 32, 32, 2, 2, 6),
    "tf32, long or odd": Entry(64, 64, 32, 8, 1, 1, 255),
    "bf16": Entry(64, 64, 32, 4, 1, 2),
    "bf16, K = 8": Entry(64, 64, 32, 4, 1, 3, 168),
    "bf16, few samples": Entry(16, 32, 32, 2, 2, 8),
    "bf16, long or odd": Entry(64, 64, 32, 8, 1, 1, 255),
}
GRADIENT = {
    "ieee": Entry(32, 32, 32, 2, 1, 4),
    "ieee, few samples": Entry(16, 32, 32, 2, 2, 4),
    "ieee, long or odd": Entry(16, 16, 16, 4, 1, 2, 255),
    "tf32": Entry(32, 32, 32, 2, 2, 4),
    "tf32, few samples": Entry(16, 64, 32, 4, 1, 2, 255),
    "tf32, long or odd": Entry(64, 32, 16, 8, 1, 1, 255),
    "bf16": Entry(64, 64, 32, 4, 1, 2),
    "bf16, few samples": Entry(16, 64, 32, 2, 1, 4, 255),
    "bf16, long or odd": Entry(64, 32, 16, 8, 1, 1, 255),
}


def with_logits(entry: Entry, gradient: bool) -> Entry:
    """`entry` for a kernel that also keeps starting logits in registers; `gradient`: it is of GRADIENT."""
    entry = entry._replace(registers=255, resident=8 // entry.warps, stages=1 if gradient else entry.stages)
    if gradient and entry.rows > 16:
        return entry._replace(rows=min(entry.rows, 32))
    return entry._replace(numbers=entry.numbers // 2)


def kind(u: Tensor, unit: str, D: int) -> str:
    """The shape class of u [B, I, K]: the key of GRADIENT, and of ROUTED unless routed() names another."""
    B, _, K = u.shape
    if D > 16 or K > 16 or D % 4 or K % 4:
        return f"{unit}, long or odd"
    return f"{unit}, few samples" if B <= 16 else unit


def routed(u: Tensor, unit: str, D: int) -> str:
    """The key of ROUTED."""
    key = kind(u, unit, D)
    special = f"{key}, K = 8"
    return special if special in ROUTED and u.shape[2] == 8 and u.dtype != torch.float16 else key


def tile(entry: Entry, B: int, I: int, D: int, K: int) -> Tile:
    most, outputs, registers = entry.rows, entry.outputs, entry.registers
    if torch.version.hip is not None:  # less shared memory; ptxas is NVIDIA's
        most, outputs, registers = min(most, 32), 16, None
    depth = min(power_of_2(K), entry.numbers)
    inputs = max(min(entry.numbers // depth, power_of_2(I)), ceil_div(16, depth))
    rows = _block(B, most)
    warps = max(entry.warps // 2, entry.warps * rows // most)
    resident = entry.resident * entry.warps // warps
    return Tile(rows, inputs, _block(D, outputs), depth, warps, entry.stages, registers, resident)


class Predictions(NamedTuple):
    """A block of û of one input capsule: samples, columns (j, d), components of the input capsule."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    resident: int = _RESIDENT

    def options(self) -> dict[str, int]:
        return {
            "R": self.rows, "C": self.columns, "KB": self.depth, "num_warps": self.warps,
            "num_stages": self.stages,
        }  # fmt: skip


def predictions(B: int, columns: int, K: int) -> Predictions:
    return Predictions(_block(B, 64), _block(columns, 64), _block(K, 32), 4, 2)


class Precomputed(NamedTuple):
    """A block of a precomputed û: input capsules, output capsules, components."""

    inputs: int
    outputs: int
    components: int
    warps: int
    resident: int = 4  # programs that a multiprocessor has room for

    def options(self) -> dict[str, int]:
        return {"C": self.inputs, "JB": self.outputs, "DP": self.components, "num_warps": self.warps}


# Numbers of û in a block, and the most of one input capsule.
_NUMBERS, _NUMBERS_OF_CAPSULE = 4096, 2048


class Shared(NamedTuple):
    """A block of routing with a shared weight: input capsules, output capsules, components of u."""

    inputs: int
    outputs: int
    depth: int
    warps: int
    resident: int = 2  # programs that a multiprocessor has room for

    def options(self) -> dict[str, int]:
        return {"C": self.inputs, "JB": self.outputs, "KB": self.depth, "num_warps": self.warps}


def shared(I: int, J: int, K: int) -> Shared:
    outputs, depth = _block(J, 64), _block(K, 64)
    return Shared(_block(I, 64 if max(outputs, depth) <= 32 else 32), outputs, depth, 4)


def pair_blocks(logits: Tensor, B: int, I: int, inputs: int) -> tuple[Split, Split]:
    """Tiles of samples and parts of input capsules, in blocks of `inputs`, of a program that adds ∂logits up.

    One sample, or one block, where logits have that axis. Along other axes there are as many as fill the
    device, but a tile has 16 samples or more: each has a sum as large as the logits. Two programs of 4 warps
    fit a multiprocessor whatever registers they take.
    """
    tiles, parts = Split(B, 1), Split(ceil_div(I, inputs), inputs)
    if logits.shape[0] == 1:
        tiles = split(B, parts.number, logits, 2, 16, waves=1)
    if logits.shape[1] == 1:
        parts = split(I, tiles.number, logits, 2, inputs, waves=1)
    return tiles, parts


def precomputed(I: int, J: int, D: int) -> Precomputed:
    components = power_of_2(D)
    outputs, numbers = power_of_2(J), _NUMBERS
    if outputs * components > _NUMBERS_OF_CAPSULE:
        outputs, numbers = max(1, _NUMBERS_OF_CAPSULE // 2 // components), _NUMBERS // 2
    inputs = max(1, min(power_of_2(I), numbers // (outputs * components)))
    return Precomputed(inputs, outputs, components, 4)
