"""Random numbers that are the same however many processes share a batch."""

import torch
from torch import Tensor


class ShardedGenerator:
    """Samples noise for the global batch and returns the part of process `rank` of `world`.

    All have the same generator in the same state: an image's numbers do not depend on which one trains on it.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu", rank: int = 0, world: int = 1) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self._on: dict = {"generator": self.generator, "device": self.generator.device}
        self.rank, self.world = rank, world

    def normal(self, B: int, *shape: int) -> Tensor:
        """Standard normal numbers [B, *shape], B this process's share of the batch."""
        return self._part(torch.randn(B * self.world, *shape, **self._on), B)

    def uniform(self, B: int, *shape: int) -> Tensor:
        """Numbers from [0, 1) of shape [B, *shape]."""
        return self._part(torch.rand(B * self.world, *shape, **self._on), B)

    def integers(self, high: int, B: int, *shape: int) -> Tensor:
        """Whole numbers from 0 to high − 1 of shape [B, *shape]."""
        return self._part(torch.randint(high, (B * self.world, *shape), **self._on), B)

    def _part(self, numbers: Tensor, B: int) -> Tensor:
        return numbers[self.rank * B : (self.rank + 1) * B]
