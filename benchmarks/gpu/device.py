"""What device was measured."""

import os

import torch

from benchmarks import machine


def describe_device(device: torch.device) -> dict[str, object]:
    """As in the files of the CPU."""
    load = os.getloadavg()[0]
    if device.type == "cpu":
        return {**machine.cpu(), "load_before": load}
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "type": "cuda",
        "model": torch.cuda.get_device_name(device),
        "isa": f"sm_{major}{minor}",
        "threads": torch.get_num_threads(),
        "load_before": load,
        "tf32": {
            "convolutions": torch.backends.cudnn.allow_tf32,
            "products": torch.backends.cuda.matmul.allow_tf32,
        },
    }
