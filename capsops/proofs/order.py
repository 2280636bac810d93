"""In which order "auto" tries backends that are proved: by op, dtype and shape class, the same everywhere.

The order ships with the package, so that all ranks, nodes and restarts choose alike. A record of times that
the user names in CAPSOPS_RECORD may change it for the GPU model that it was measured on.
"""

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from capsops.backends.device import Device

FEW, USUAL, WIDE, LONG = "few samples", "usual", "many outputs", "long capsules"
CLASSES = (FEW, USUAL, WIDE, LONG)

# Called from Python on an H200, the CUDA kernels were faster than Triton's in every case up to B = 128: to
# launch Triton's takes longer than the CUDA kernels take in all (benchmarks/results/NOTES.md).
ORDER = ("cuda", "triton", "cpu", "reference")
# Above D = 32 or K = 64 the CUDA kernels are plain loops.
ORDER_OF_LONG = ("triton", "cpu", "reference", "cuda")

# û, and what autograd stores beside it, in units of û.
_COPIES = 4

Shapes = tuple[tuple[int, ...], ...]


class Sizes(NamedTuple):
    """Those of a capsule layer; 0 for one that the op does not have or the shapes do not tell."""

    B: int = 0
    I: int = 0  # noqa: E741
    J: int = 0
    D: int = 0
    K: int = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """D, and K where there is a weight."""
        return (self.D, self.K) if self.K else (self.D,) if self.D else ()


def sizes(op: str, shapes: Shapes) -> Sizes:
    """The sizes of a call, from the shapes of u and W, or of û; none for squash."""
    if len(shapes) == 2:
        (B, I, K), (J, D, _) = shapes[0], shapes[1][-3:]  # noqa: E741
        return Sizes(B, I, J, D, K)
    if len(shapes) == 1 and op.startswith("dynamic_routing"):
        B, I, *outputs, D = shapes[0]  # noqa: E741
        return Sizes(B, I, outputs[0] if outputs else 1, D)
    return Sizes()


def shape_class(sizes: Sizes) -> str:
    """The class of a call in the tables of order."""
    if sizes.D > 32 or sizes.K > 64:
        return LONG
    if sizes.J * sizes.D > 1024:
        return WIDE
    return FEW if 0 < sizes.B <= 16 else USUAL


def fits(sizes: Sizes, itemsize: int, memory: int) -> bool:
    """Whether the reference, which stores û, has room for it in a device's whole memory; 0: unknown."""
    u_hat = sizes.B * sizes.I * sizes.J * sizes.D * itemsize
    return not memory or _COPIES * u_hat <= memory


def order(op: str, dtype: str, sizes: Sizes, device: Device) -> tuple[str, ...]:
    """Names of backends, the first choice first."""
    op, kind = op.removesuffix("_backward"), shape_class(sizes)
    shipped = ORDER_OF_LONG if kind == LONG else ORDER
    measured = _measured(record_file(), device.model).get((op, dtype, kind), ())
    return (*measured, *(name for name in shipped if name not in measured))


@lru_cache
def record_file() -> str:
    """The file that CAPSOPS_RECORD names; as it was at the first use, so that a process keeps its choices."""
    return os.environ.get("CAPSOPS_RECORD", "")


@lru_cache
def _measured(file: str, model: str) -> dict[tuple[str, str, str], tuple[str, ...]]:
    """The orders in the record of times, if it is of this device model.

    Raises:
        ValueError: the file cannot be read, or is not what `python -m capsops check --json` prints.
    """
    if not file:
        return {}
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
        if values["device"]["model"] != model:
            return {}
        return {
            (str(row["op"]), str(row["dtype"]), str(row["class"])): _names(row["order"])
            for row in values["times"]
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"environment variable CAPSOPS_RECORD: got {file!r}, takes a file with what"
            f" `python -m capsops check --json` prints ({type(error).__name__}: {error})"
        ) from error


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError(f"an order is a list, not {value!r}")
    return tuple(map(str, value))
