"""Several processes that train on one global batch: `torchrun --nproc-per-node N -m infocapsgan.train …`.

Each process takes its part of every batch, and gradients are averaged once they are all there: the arithmetic
of DistributedDataParallel, for systems with several networks, losses and inner gradients as well.
"""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is."""

    rank: int = 0
    world: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def part(self, batch: Tensor) -> Tensor:
        """This process's part of a global batch [B, …]."""
        return batch.chunk(self.world)[self.rank]

    def average_(self, tensors: list[Tensor]) -> None:
        """Puts the average over the processes into each tensor, by one exchange."""
        if self.world == 1:
            return
        flat = torch.cat([tensor.flatten().float() for tensor in tensors])
        distributed.all_reduce(flat)
        flat /= self.world
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def mean(self, local: Tensor) -> Tensor:
        """The average of `local` over the processes, with the gradient of `local`.

        For a loss that is not itself a mean over the batch, like the entropy of the mean prediction: the
        gradients that are averaged later are then those of the whole batch.
        """
        if self.world == 1:
            return local
        everywhere = local.detach().clone()
        self.average_([everywhere])
        return local + (everywhere - local).detach()

    def any(self, here: bool, device: torch.device) -> bool:
        """Whether `here` is true in any process."""
        if self.world == 1:
            return here
        flag = torch.tensor(float(here), device=device)
        distributed.all_reduce(flag)
        return bool(flag > 0)

    def gather(self, here: Any, device: torch.device) -> list[Any]:
        """What every process has `here`, in the order of their ranks."""
        everywhere = [here] * self.world
        if self.world > 1:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                distributed.all_gather_object(everywhere, here)
        return everywhere

    def stop(self, here: bool, step: int, device: torch.device) -> bool:
        """Whether to stop after this step, which all processes decide alike: `here` is true in one of them.

        Asking them makes the host wait for the device: several GPUs are asked every ten steps.
        """
        asked = self.world == 1 or device.type != "cuda" or step % 10 == 0
        return asked and self.any(here, device)


def join(device: torch.device) -> Processes:
    """Meets the other processes that torchrun started, if it did: gloo on CPUs, nccl on GPUs."""
    if "WORLD_SIZE" not in os.environ:
        return Processes()
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(distributed.get_rank(), distributed.get_world_size())


def leave() -> None:
    """Parts from the other processes."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def synchronise_batch_norm(system: nn.Module, processes: Processes, device: torch.device) -> None:
    """Batch norm of the whole batch on GPUs; on CPUs, for which torch has none, of each part by itself."""
    if processes.world > 1 and device.type == "cuda":
        for name, child in system.named_children():
            setattr(system, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
