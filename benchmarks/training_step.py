"""A capsule classifier's training step, whole and in its two parts: torch's convolutions, and the capsules.

Both parts together do exactly what the whole does, with the tensor between them given from outside.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import capsops

TYPES, DIM, CLASSES = 32, 8, 10

Squash = Callable[[Tensor], Tensor]
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]  # (u, weight, bias) -> v


@dataclass
class Step:
    """Conv 9×9 → conv 9×9, stride 2, into 32 types of capsules → squash → routing → margin loss.

    (Sabour, Frosst, Hinton 2017, without the decoder.) The first convolution has `width` channels,
    256 in the paper.
    """

    images: Tensor  # [B, 1, 28, 28]
    labels: Tensor  # one-hot [B, 10]
    convolutions: nn.Module
    weight: Tensor
    bias: Tensor
    features: Tensor  # what the convolutions give [B, 256, 6, 6], as a leaf
    grad_features: Tensor  # and an upstream gradient of it

    @classmethod
    def build(cls, batch: int, width: int) -> "Step":
        images = torch.rand(batch, 1, 28, 28)
        labels = nn.functional.one_hot(torch.randint(CLASSES, (batch,)), CLASSES).float()
        convolutions = nn.Sequential(
            nn.Conv2d(1, width, 9), nn.ReLU(), nn.Conv2d(width, TYPES * DIM, 9, stride=2)
        )
        features = convolutions(images).detach().requires_grad_()
        layer = capsops.nn.RoutingCapsules(TYPES * 36, CLASSES, DIM, 16)
        return cls(
            *(images, labels, convolutions, layer.weight, layer.bias),
            *(features, torch.randn_like(features)),
        )

    def loss(self, features: Tensor, squash: Squash, layer: Layer) -> Tensor:
        """Everything behind the convolutions."""
        s = features.reshape(features.shape[0], TYPES, DIM, -1).transpose(2, 3)
        v = layer(squash(s.reshape(features.shape[0], -1, DIM)), self.weight, self.bias)
        length = v.square().sum(-1).sqrt()
        present, absent = (0.9 - length).relu().square(), (length - 0.1).relu().square()
        return (self.labels * present + 0.5 * (1 - self.labels) * absent).sum(1).mean()

    def whole(
        self, squash: Squash = capsops.squash, layer: Layer = capsops.capsule_routing
    ) -> tuple[Tensor, ...]:
        """Gradients of all parameters."""
        loss = self.loss(self.convolutions(self.images), squash, layer)
        return torch.autograd.grad(loss, (*self.convolutions.parameters(), self.weight, self.bias))

    def convolutions_alone(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            self.convolutions(self.images), tuple(self.convolutions.parameters()), self.grad_features
        )

    def capsules_alone(self) -> tuple[Tensor, ...]:
        loss = self.loss(self.features, capsops.squash, capsops.capsule_routing)
        return torch.autograd.grad(loss, (self.features, self.weight, self.bias))
