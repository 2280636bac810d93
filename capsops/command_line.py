"""What the commands of `python -m capsops` share: the option --device, and tables."""

import argparse
from collections.abc import Iterable

import torch


def device_named(name: str) -> torch.device:
    """The device that --device names, a GPU with its index."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"got {name!r}, takes cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise argparse.ArgumentTypeError(f"got {name!r}, and torch sees {count} CUDA devices")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows of cells, in columns as wide as their widest cell."""
    rows = list(rows)
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(f"  {line}" for line in lines)
