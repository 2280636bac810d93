"""What the kernels are to reach on an H100 or H200, and whether they did.

At B = 128, I = 1152, J = 10, D = 16, K = 8, T = 3, by graph replay; and an epoch of CapsNet on MNIST.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from capsops.measuring.headline import BF16, REPLAY, TF32
from capsops.measuring.passes import BOTH, FORWARD

BATCH = 128
EAGER, COMPILED = 6, 3  # times as fast as plain PyTorch, at least
MEMORY = 1 / 25  # of that of plain PyTorch, at most
MICROSECONDS = {FORWARD: 42, BOTH[1]: 110}  # in TF32, at most
EPOCH_SECONDS = 4  # in bf16, at most


def _verdict(what: str, got: float | None, wanted: float, most: bool) -> str:
    relation = "at most" if most else "at least"
    if got is None:
        return f"not measured: {what}, {relation} {wanted:.3g}"
    met = got <= wanted if most else got >= wanted
    return f"{'met' if met else 'MISSED'}: {what}: {got:.3g}, {relation} {wanted:.3g}"


def verdicts(rows: Sequence[Mapping[str, Any]], epochs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each goal, from the rows of `python -m capsops bench --json` and of the part `train`."""
    for precision in (TF32, BF16):
        for passes in BOTH:
            matching = [
                row
                for row in rows
                if (row["batch"], row["precision"], row["passes"], row["timed_by"])
                == (BATCH, precision, passes, REPLAY)
            ]
            name, row = f"{precision}, {passes}", matching[0] if matching else None
            for form, wanted in (("eager", EAGER), ("compiled", COMPILED)):
                peer = min(row[form].values(), default=None) if row else None
                ratio = peer / row["ours"] if row and peer else None
                yield _verdict(f"{name}, × plain PyTorch {form}", ratio, wanted, most=False)
            if precision == TF32:
                microseconds = row["ours"] * 1e6 if row else None
                yield _verdict(f"{name}, µs", microseconds, MICROSECONDS[passes], most=True)
            if passes != FORWARD:
                share = _memory(row) if row else None
                yield _verdict(f"{name}, memory, share of eager plain PyTorch's", share, MEMORY, most=True)
    seconds = [row["seconds"] for row in epochs if row["precision"] == "bf16" and "seconds" in row]
    least = min(seconds, default=None)
    yield _verdict("an epoch of CapsNet in bf16, seconds", least, EPOCH_SECONDS, most=True)


def _memory(row: Mapping[str, Any]) -> float | None:
    ours = row["memory"].get("ours")
    others = [size for name, size in row["memory"].items() if name in row["eager"] and size]
    return ours / min(others) if ours is not None and others else None
