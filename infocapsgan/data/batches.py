"""Batches in a shuffled order that can be resumed at any step."""

import torch
from torch import Tensor


class Batches:
    """Which of N images make up which step: an epoch is a permutation, without an incomplete last batch.

    The order of an epoch depends only on the seed and its number, so a position is one number: the step.
    """

    def __init__(self, images: int, batch_size: int, seed: int, device: torch.device | str = "cpu") -> None:
        if not 1 <= batch_size <= images:
            raise ValueError(f"--batch-size: got {batch_size}, takes 1 to {images}, the number of images")
        self.images, self.batch_size, self.seed, self.device = images, batch_size, seed, device
        self.per_epoch = images // batch_size
        self._epoch, self._order = -1, torch.empty(0)

    def indices(self, step: int) -> Tensor:
        """Indices [batch_size] of the images of step 0, 1, …"""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            # One seed of two numbers, so that seed 0 epoch 1 is not seed 1 epoch 0.
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
            self._order = torch.randperm(self.images, generator=generator).to(self.device)
            self._epoch = epoch
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]
