"""A system's training step as the training loop takes it, and where its time goes."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import peers
from capsops.nn import RoutingCapsules
from infocapsgan import checkpoint
from infocapsgan.data import Dataset
from infocapsgan.data.batches import Batches
from infocapsgan.draw import Draw
from infocapsgan.systems.system import System
from infocapsgan.training import Training

# The names under which torch's profiler lists each part, with all that happens below that name.
PARTS = {
    "routing": ("capsops::capsule_routing", "capsops::capsule_routing_backward"),
    "squash": ("capsops::squash", "capsops::squash_backward"),
    "convolutions": ("aten::convolution", "aten::convolution_backward"),
    "loader": ("loader", "augmentation"),
    "optimiser": ("Optimizer.step#Adam.step",),
}


class EinsumCapsules(nn.Module):
    """The weights of a RoutingCapsules, routed by einsum."""

    def __init__(self, layer: RoutingCapsules) -> None:
        super().__init__()
        if layer.leaky or layer.detach:
            raise ValueError("layer: got one with leaky or detach, takes neither")
        self.weight, self.bias, self.iterations = layer.weight, layer.bias, layer.iterations

    def forward(self, u: Tensor) -> Tensor:
        return peers.einsum(u, self.weight, self.bias, self.iterations)


class SystemStep:
    """Each call is one step of the training loop, without what is written; it returns the named losses.

    Args:
        system: on its device.
        dataset: on the same device.
    """

    def __init__(self, system: System, dataset: Dataset) -> None:
        s = system.settings
        self.system, self.dataset, self.device = system, dataset, dataset.train_images.device
        self.batches = Batches(len(dataset.train_images), s.batch_size, s.seed, self.device)
        self.training = Training(
            system.optimizers,
            Draw(s.seed, self.device),
            precision=s.precision,
            device=self.device,
            steps_per_epoch=self.batches.per_epoch,
        )
        self.training.at_once = False

    def __call__(self) -> dict[str, Tensor]:
        training = self.training
        if training.step % self.system.settings.log_every == 0:
            training.check()
            checkpoint.capture(self.system, training)
        with record_function("loader"):
            batch = self.dataset.train_batch(self.batches.indices(training.step), training.draw)
        named = self.system.step(*batch, training)
        training.step += 1
        return named


def clock(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds that so many calls take together, until the device is done."""
    synchronise(device)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    synchronise(device)
    return time.perf_counter() - begin


def synchronise(device: torch.device) -> None:
    """Waits until a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parts(call: Callable[[], object], calls: int, device: torch.device) -> dict[str, float]:
    """Seconds of one call by part, as torch's profiler sees them: on a GPU the time of kernels.

    "other" is what else the device did; on a GPU "idle" is the time in which no kernel ran, which includes
    what the profiler itself takes.
    """
    found, wall = profiled(call, calls, device)
    cuda = device.type == "cuda"
    ops = [event for event in found if event.device_type == DeviceType.CPU]
    total = {event.key: event.device_time_total if cuda else event.cpu_time_total for event in ops}
    seconds = {
        part: sum(total.get(name, 0.0) for name in names) / 1e6 / calls for part, names in PARTS.items()
    }
    busy = sum(time for _, time in kernels(found)) / calls if cuda else wall
    seconds["other"] = busy - sum(seconds.values())
    return {**seconds, "idle": wall - busy} if cuda else seconds


def kernels(found: Sequence[FunctionEventAvg]) -> list[tuple[str, float]]:
    """Name and seconds of each kernel of a GPU that the profiler saw, longest first."""
    seen = [
        (event.key, event.self_device_time_total / 1e6)
        for event in found
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return sorted(seen, key=lambda kernel: -kernel[1])


def profiled(
    call: Callable[[], object], calls: int, device: torch.device
) -> tuple[list[FunctionEventAvg], float]:
    """The profiler's averages over so many calls, and the seconds of one of them under it."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        wall = clock(call, calls, device) / calls
    return list(profiler.key_averages()), wall
