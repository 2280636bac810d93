"""A device as far as kernels depend on it: its model, driver and capabilities."""

import platform
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

OLDEST_CAPABILITY = (8, 0)


class Device(NamedTuple):
    """One device. What does not exist for its type is empty or 0."""

    type: str  # "cuda" or "cpu"
    model: str
    number: int = 0  # torch's index
    driver: str = ""
    capability: tuple[int, int] = (0, 0)
    memory: int = 0  # bytes
    uuid: str = ""

    @property
    def torch_name(self) -> str:
        return f"{self.type}:{self.number}" if self.type == "cuda" else self.type

    @property
    def why_too_old(self) -> str:
        """Why a GPU has not what the kernels use, such as bfloat16; empty where it has."""
        if self.capability >= OLDEST_CAPABILITY:
            return ""
        return "its compute capability is {}.{}; the kernels need {}.{} or newer".format(
            *self.capability, *OLDEST_CAPABILITY
        )


def cpu_model() -> str:
    """The processor's name as the system reports it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text() if info.exists() else "", re.MULTILINE)
    return names[0] if names else platform.processor() or platform.machine()


def gpu_driver() -> str:
    """The release of the GPU's driver, as far as the system says it."""
    if torch.version.hip is not None:
        module = Path("/sys/module/amdgpu/version")
        return f"ROCm {torch.version.hip}, {module.read_text().strip() if module.exists() else 'amdgpu'}"
    loaded = Path("/proc/driver/nvidia/version")
    releases = re.findall(r"\s(\d+\.\d+[.\d]*)\s", loaded.read_text() if loaded.exists() else "")
    return releases[0] if releases else f"for CUDA {driver_cuda()}"


def driver_cuda() -> str:
    """The newest release of CUDA that the NVIDIA driver supports, such as "13.0"."""
    torch_c: Any = torch._C
    number = torch_c._cuda_getDriverVersion()
    return f"{number // 1000}.{number % 1000 // 10}"


@lru_cache
def facts(type: str, index: int) -> Device:
    """What is known of a device; asked once in a process."""
    if type != "cuda":
        return Device(type, cpu_model() if type == "cpu" else type)
    properties: Any = torch.cuda.get_device_properties(index)
    return Device(
        type,
        properties.name,
        index,
        gpu_driver(),
        (properties.major, properties.minor),
        properties.total_memory,
        "" if torch.version.hip else str(getattr(properties, "uuid", "")),  # ROCm's has variables of its own
    )
