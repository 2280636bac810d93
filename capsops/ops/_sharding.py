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
    from torch.distributed.tensor import Partial, Replicate, Shard

    names = [argument.name for argument in op._schema.arguments]
    tensors = [
        "Tensor" in str(argument.type) and value is not None
        for argument, value in zip(op._schema.arguments, args, strict=True)
    ]
    results = len(op._schema.returns)
    whole = [Replicate()] * results, [Replicate() if tensor else None for tensor in tensors]
    choices = [whole]
    for outputs, inputs in shards(*args):
        choices.append(
            (
                [Partial() if axis == SUM else Shard(axis) for axis in outputs],
                [
                    (Shard(inputs[name]) if name in inputs else Replicate()) if tensor else None
                    for name, tensor in zip(names, tensors, strict=True)
                ],
            )
        )
    return choices


def register_shardings(shardings: Mapping[str, Callable[..., list[Shards]]]) -> None:
    """Tells torch.distributed.tensor of the shardings of ops, by name."""
    from torch.distributed.tensor.experimental import register_sharding

    for name, shards in shardings.items():
        op = getattr(torch.ops.capsops, name).default
        register_sharding(op)(partial(_placements, op, shards))
