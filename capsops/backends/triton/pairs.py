"""Numbers of pairs of capsules, [B, I, J]: starting logits, and the sums that make their gradient."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from capsops.backends.triton import reductions


class Pairs(NamedTuple):
    """A tensor with the axes B, I and J as kernels take it: where it begins, and its stride along each axis.

    A stride is None where the tensor has one number for all of an axis: the compiler leaves that axis out.
    """

    p: Any
    batch: int | None
    inputs: int | None
    outputs: int | None


class PairSums(NamedTuple):
    """The same for a tensor that kernels add to, and the strides of its partial sums.

    Where it has one number for all of the batch, each tile of samples has a sum of its own; where it has one
    for all input capsules, each part of these.
    """

    p: Any
    batch: int | None
    inputs: int | None
    outputs: int | None
    tile: int | None
    part: int | None


def _strides(x: Tensor) -> list[int | None]:
    return [None if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]


def pairs(x: Tensor | None) -> Pairs | None:
    return None if x is None else Pairs(x, *_strides(x))


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    """A mask of input capsules [B, I] as kernels take it."""
    return None if mask is None else mask.view(torch.uint8)


class LogitsGradient:
    """∂logits = Σ ∂b over passes, and over the axes along which logits are broadcast, in a fixed order.

    Kernels add to partial sums of float32, each program to its own, which are added up at the end.
    """

    def __init__(self, logits: Tensor, tiles: int, parts: int) -> None:
        """For programs that have one of `tiles` tiles of samples and one of `parts` parts of i."""
        tiles = tiles if logits.shape[0] == 1 else 1
        parts = parts if logits.shape[1] == 1 else 1
        self.sums = torch.zeros(tiles * parts, *logits.shape, dtype=torch.float32, device=logits.device)
        self.dtype = logits.dtype
        self.tile = None if tiles == 1 else parts * logits.numel()
        self.part = None if parts == 1 else logits.numel()

    def arguments(self) -> PairSums:
        batch, inputs, outputs = _strides(self.sums[0])
        return PairSums(self.sums, batch, inputs, outputs, self.tile, self.part)

    def result(self) -> Tensor:
        return reductions.added(self.sums, self.dtype)


@triton.jit
def _index(x, b, m_b, i, m_i, j, m_j):
    """Where x has samples b, input capsules i and output capsules j, and a mask."""
    at = tl.zeros([1, 1], tl.int64)
    mask = at == 0
    if x.batch is not None:
        at += tl.cast(b, tl.int64) * x.batch
        if m_b is not None:
            mask = mask & m_b
    if x.inputs is not None:
        at += tl.cast(i, tl.int64) * x.inputs
        if m_i is not None:
            mask = mask & m_i
    if x.outputs is not None:
        at += tl.cast(j, tl.int64) * x.outputs
        if m_j is not None:
            mask = mask & m_j
    return at, mask


@triton.jit
def load_pairs(x, b, m_b, i, m_i, j, m_j):
    """x of samples b, input capsules i and output capsules j, in float32; 0 where a mask is False.

    Two of the indices are blocks along an axis of their own, with masks, the third is a number without. The
    result has 1 for an axis for which x has one number.
    """
    at, mask = _index(x, b, m_b, i, m_i, j, m_j)
    return tl.load(x.p + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def add_pairs(x, tile, part, b_x, b, m_b, i, m_i, j, m_j):
    """Adds a block, 0 where a mask is False, to x, summed along an axis for which x has one number.

    The indices are as in load_pairs; `tile` and `part` are the program's.
    """
    at, mask = _index(x, b, m_b, i, m_i, j, m_j)
    if at.shape[0] < b_x.shape[0]:
        b_x = tl.sum(b_x, 0, keep_dims=True)
    if at.shape[1] < b_x.shape[1]:
        b_x = tl.sum(b_x, 1, keep_dims=True)
    if x.tile is not None:
        at += tl.cast(tile, tl.int64) * x.tile
    if x.part is not None:
        at += tl.cast(part, tl.int64) * x.part
    p = x.p + at
    tl.store(p, tl.load(p, mask=mask, other=0.0) + b_x, mask=mask)
