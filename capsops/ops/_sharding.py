"""How the ops share their work on DTensors: a batch over several devices, without a word between them.

Each op says which axes of its arguments and results may lie on several devices, and which results are then
sums that are still to be added up. torch.distributed.tensor is told when it is first needed: its import takes
a third of that of torch.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

SUM = "sum"  # a result of which each device has a part of every number

# Of results, an axis or SUM each; of arguments by name, an axis; other tensors are whole on every device.
Shards = tuple[Sequence[int | str], Mapping[str, int]]


def _placements(op: torch._ops.OpOverload, shards: Callable[..., list[Shards]], *args: Any) -> list[tuple]:
    """In torch's terms: of results and of arguments, None for what is no tensor."""
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
    """Tells torch.distributed.tensor of the shardings of ops, by name."""
    from torch.distributed.tensor.experimental import register_sharding

    for name, shards in shardings.items():
        op = getattr(torch.ops.capsops, name).default
        register_sharding(op)(partial(_placements, op, shards))
