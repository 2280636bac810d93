"""Random numbers that are the same however many processes share a batch."""

import torch
from torch import Tensor


class ShardedGenerator:
    """Draws noise for the global batch and hands out this process's part of it.

    Every process holds the same generator in the same state, so the numbers of image b do not depend on which
    process trains on it.

    Args:
        seed: of the generator.
        device: where the numbers are drawn.
        rank: the number of this process.
        world: how many processes share a batch.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu", rank: int = 0, world: int = 1) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.rank, self.world = rank, world

    def normal(self, B: int, *shape: int) -> Tensor:
        """Standard normal numbers [B, *shape], B this process's share of the batch."""
        return self._part(torch.randn(B * self.world, *shape, **self._where()), B)

    def uniform(self, B: int, *shape: int) -> Tensor:
        """Numbers from [0, 1) of shape [B, *shape]."""
        return self._part(torch.rand(B * self.world, *shape, **self._where()), B)

    def integers(self, high: int, B: int, *shape: int) -> Tensor:
        """Whole numbers from 0 to high − 1 of shape [B, *shape]."""
        return self._part(torch.randint(high, (B * self.world, *shape), **self._where()), B)

    def _where(self) -> dict:
        return {"generator": self.generator, "device": self.generator.device}

    def _part(self, numbers: Tensor, B: int) -> Tensor:
        return numbers[self.rank * B : (self.rank + 1) * B]
