"""What a peer is: the capsule layer of a public repository, and the capsops call that replaces it."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from capsops.nn import RoutingCapsules
from tests.capsops.cases import Shape, layer_inputs

AXES = "IJDK"
SMALL = Shape(3, 20, 10, 16, 8)


def in_layout(weight: Tensor, layout: str) -> Tensor:
    """A weight [I, J, D, K], or [J, D, K], in another layout, named as for RoutingCapsules.from_weight."""
    axes = re.findall(r"\(..\)|.", layout)
    letters = re.sub("[^IJDK]", "", layout)
    own = AXES[-weight.dim() :]
    weight = weight.permute([own.index(letter) for letter in letters])
    for axis, letters in enumerate(axes):
        if letters == "1":
            weight = weight.unsqueeze(axis)
        elif len(letters) > 1:
            weight = weight.flatten(axis, axis + 1)
    return weight.contiguous()


def from_layout(weight: Tensor, layout: str) -> Tensor:
    """A view of a weight in `layout` as [I, J, D, K], or [J, D, K]; no axis may stand for two letters."""
    own = [letter for letter in AXES if letter in layout]
    return weight.squeeze([axis for axis, letter in enumerate(layout) if letter == "1"]).permute(
        [layout.replace("1", "").index(letter) for letter in own]
    )


def capsules_and_weight(shape: Shape, layout: str) -> tuple[Tensor, Tensor]:
    """u [B, I, K] and a weight in `layout`, which give predictions of order 1."""
    u, weight, _ = layer_inputs(shape)
    return u, in_layout(weight if "I" in layout else weight[0], layout)


def bias_and_logits(shape: Shape) -> tuple[Tensor, Tensor]:
    """β [J, D] and starting logits [I, J]."""
    generator = torch.Generator().manual_seed(2)
    beta = torch.randn(shape.J, shape.D, generator=generator, dtype=torch.float64) / 3
    return beta, torch.randn(shape.I, shape.J, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Peer:
    """A layer of a public repository, written anew from its formulas, and what replaces it.

    Args:
        name: of the layer.
        repository: on GitHub.
        source: the file that was read, and its commit.
        layer: the repository's result for `inputs`; takes `eps`, the repository's epsilon in squash.
        replacement: the same result by capsops, for `convert(*inputs)`.
        inputs: makes the input capsules and the weights, in the repository's layout.
        convert: the inputs as capsops takes them; views, so that gradients are those of the repository's.
        eps: the repository's own epsilon.
        difference: what that epsilon changes at most in the small case, of the largest entry.
        sizes: the repository's own sizes; the batch is one that fits into memory.
        module: a RoutingCapsules with the repository's weights, where the layer is one.
        small: sizes for tests.
    """

    name: str
    repository: str
    source: str
    layer: Callable[..., Tensor]
    replacement: Callable[..., Tensor]
    inputs: Callable[[Shape], tuple[Tensor, ...]]
    convert: Callable[..., tuple[Tensor, ...]]
    eps: float
    difference: float
    sizes: Shape
    module: Callable[..., RoutingCapsules] | None = None
    small: Shape = SMALL

    def short_inputs(self, shape: Shape) -> tuple[Tensor, ...]:
        """Inputs with predictions of length 1; those of `inputs` are √D long."""
        u, *weights = self.inputs(shape)
        return u / shape.D**0.5, *weights

    def __str__(self) -> str:
        return f"{self.repository.split('/')[0]}-{self.name}"
