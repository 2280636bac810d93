"""A system's training step as the training loop takes it, and where its time goes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile, record_function

from capsops.measuring import peers
from capsops.measuring.comparison import relative_error
from capsops.measuring.timing import clock
from capsops.nn import RoutingCapsules
from infocapsgan.data import Dataset
from infocapsgan.data.batches import Batches
from infocapsgan.engine import checkpoint
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.train_state import TrainState
from infocapsgan.systems import CapsNet
from infocapsgan.systems.system import System

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
    """Each call is one step of the training loop, with nothing written; it returns the named losses.

    Args:
        system: on its device.
        dataset: on the same device.
    """

    def __init__(self, system: System, dataset: Dataset) -> None:
        s = system.settings
        self.system, self.dataset, self.device = system, dataset, dataset.train_images.device
        self.batches = Batches(len(dataset.train_images), s.batch_size, s.seed, self.device)
        self.state = TrainState(
            system.optimizers,
            ShardedGenerator(s.seed, self.device),
            precision=s.precision,
            device=self.device,
            steps_per_epoch=self.batches.per_epoch,
        )
        self.state.at_once = False

    def __call__(self) -> dict[str, Tensor]:
        state = self.state
        if state.step % self.system.settings.log_every == 0:
            state.check()
            checkpoint.capture(self.system, state)
        with record_function("loader"):
            batch = self.dataset.train_batch(self.batches.indices(state.step), state.rng)
        named = self.system.step(*batch, state)
        state.step += 1
        return named


def check_equal(ours: CapsNet, einsum: CapsNet, dataset: Dataset, bound: float = 1e-4) -> None:
    """Raises AssertionError unless both models have the same class capsules for a few images."""
    batch = dataset.train_images[:8].float() / 255
    with torch.no_grad():
        capsules, expected = (system.model.encoder(batch).classes for system in (ours, einsum))
    error = relative_error(capsules, expected)
    if not error < bound:
        raise AssertionError(f"the two models differ by {error:.2e} of the class capsules")


def profiled(call: Callable[[], object], calls: int, device: torch.device) -> tuple[EventList, float]:
    """The profiler's averages over `calls` calls, and the seconds of one of them under it."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        seconds = clock(call, calls, device) / calls
    return profiler.key_averages(), seconds


def parts(events: EventList, seconds: float, calls: int, device: torch.device) -> dict[str, float]:
    """Seconds of one call by part, from what `profiled` returns: on a GPU the time of kernels.

    "other" is what else the device did; on a GPU "idle" is the time in which no kernel ran, which includes
    what the profiler itself takes.
    """
    cuda, busy = device.type == "cuda", seconds
    ops = [event for event in events if event.device_type == DeviceType.CPU]
    total = {event.key: event.device_time_total if cuda else event.cpu_time_total for event in ops}
    by_part = {part: sum(total.get(x, 0.0) for x in names) / 1e6 / calls for part, names in PARTS.items()}
    if cuda:
        kernels = [x for x in events if x.device_type == DeviceType.CUDA and not x.is_user_annotation]
        busy = sum(kernel.self_device_time_total for kernel in kernels) / 1e6 / calls
    by_part["other"] = busy - sum(by_part.values())
    return {**by_part, "idle": seconds - busy} if cuda else by_part
