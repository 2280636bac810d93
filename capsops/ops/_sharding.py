"""How the ops divide their work on DTensors: a batch over several devices, without communication.

Each op lists the axes of its arguments and results that may be sharded over devices, and the results that are
then partial sums. They are registered with torch.distributed.tensor only where a program uses it: to import
it takes a third of the time that torch takes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

SUM = "sum"  # a result of which each device has a partial sum

# For each result the sharded axis or SUM, and for arguments by name the sharded axis; others are replicated.
Shards = tuple[Sequence[int | str], Mapping[str, int]]


def logits_axis(logits: Any, capsules: Any) -> dict[str, int]:
    """The batch's axis of starting logits, by their name; empty where they are the same for every sample."""
    if logits is None or len(logits.shape) < 3 or logits.shape[0] != capsules.shape[0]:
        return {}
    return {"logits": 0}


def _placements(op: torch._ops.OpOverload, shards: Callable[..., list[Shards]], *args: Any) -> list[tuple]:
    """Choices of placements for results and arguments, None for an argument that is not a tensor."""
    from torch.distributed.tensor import Partial, Placement, Replicate, Shard

    def of_result(axis: int | str) -> Placement:
        return Shard(axis) if isinstance(axis, int) else Partial(axis)

    def of_argument(name: str, axes: Mapping[str, int]) -> Placement:
        return Shard(axes[name]) if name in axes else Replicate()

    names = [argument.name for argument in op._schema.arguments]
    tensors = [
        "Tensor" in str(argument.type) and value is not None
        for argument, value in zip(op._schema.arguments, args, strict=True)
    ]
    whole: Shards = (), {}
    choices = []
    for results, axes in (whole, *shards(*args)):
        placements = [of_result(axis) for axis in results] or [Replicate()] * len(op._schema.returns)
        arguments = zip(names, tensors, strict=True)
        choices.append(
            (placements, [of_argument(name, axes) if tensor else None for name, tensor in arguments])
        )
    return choices


def register_shardings(shardings: Mapping[str, Callable[..., list[Shards]]]) -> None:
    """Registers the shardings of ops, by name, with torch.distributed.tensor."""
    from torch.distributed.tensor.experimental import register_sharding

    for name, shards in shardings.items():
        op = getattr(torch.ops.capsops, name).default
        register_sharding(op)(partial(_placements, op, shards))
