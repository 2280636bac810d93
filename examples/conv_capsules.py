"""Handwritten digits by two convolutional layers of capsules.

A convolution makes maps of capsules, ConvRoutingCapsules routes those under a kernel of 3 × 3, and a second
layer, whose kernel is as large as the map, routes the output of the first to one capsule for each digit; the
longest one is the answer (Sabour, Frosst, Hinton 2017, for the loss; Hinton, Sabour, Frosst 2018, for the
layers). The images are the 1,797 of 8 × 8 pixels that come with scikit-learn, a fifth of them for the test.
The learning rate, the batch size and the number of epochs were chosen on a fifth of the training images.

    python examples/conv_capsules.py
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from side_by_side import side_by_side
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import capsops


def plain_layer(
    u: Tensor, weight: Tensor, bias: Tensor, stride: int = 1, padding: int = 0, iterations: int = 3
) -> Tensor:
    """What capsops.nn.ConvRoutingCapsules replaces: predictions for all positions, in memory."""
    C, kh, kw, *_, K = weight.shape
    height, width = ((n + 2 * padding - k) // stride + 1 for n, k in zip(u.shape[3:], (kh, kw), strict=True))
    windows = F.unfold(u.flatten(1, 2), (kh, kw), padding=padding, stride=stride)
    windows = windows.unflatten(1, (C, K, kh * kw)).permute(0, 4, 1, 3, 2).flatten(2, 3)  # [B, H′·W′, I, K]
    u_hat = torch.einsum("blik,ijdk->blijd", windows, weight.flatten(0, 2))
    logits = u_hat.new_zeros(u_hat.shape[:-1])
    for t in range(iterations):
        s = torch.einsum("blij,blijd->bljd", logits.softmax(-1), u_hat) + bias
        square = s.square().sum(-1, keepdim=True)
        v = s * square.clamp_min(1e-30).sqrt() / (1 + square)
        if t < iterations - 1:
            logits = logits + torch.einsum("blijd,bljd->blij", u_hat, v)
    return v.permute(0, 2, 3, 1).unflatten(3, (height, width))


class Network(nn.Module):
    """Images [B, 1, 8, 8] → digit capsules [B, 10, 16]."""

    def __init__(self, types: int = 8, dim: int = 8) -> None:
        super().__init__()
        self.types = types
        self.stem = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, types * dim, 3, padding=1)
        )
        self.hidden = capsops.nn.ConvRoutingCapsules(
            types, types, dim, dim, kernel_size=3, stride=2, padding=1
        )
        self.digits = capsops.nn.ConvRoutingCapsules(types, 10, dim, 16, kernel_size=4)

    def primary(self, images: Tensor) -> Tensor:
        """Capsules [B, C, K, 8, 8]: as many channels as a capsule has numbers, squashed."""
        return capsops.squash(self.stem(images).unflatten(1, (self.types, -1)), 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.digits(self.hidden(self.primary(images))).flatten(2)


def margin_loss(v: Tensor, labels: Tensor) -> Tensor:
    length, present = v.norm(dim=-1), F.one_hot(labels, 10)
    missed, wrong = (0.9 - length).relu() ** 2, (length - 0.1).relu() ** 2
    return (present * missed + 0.5 * (1 - present) * wrong).sum(1).mean()


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    labels = torch.from_numpy(data.target).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return images[train], labels[train], images[test], labels[test]


def fit(images: Tensor, labels: Tensor, epochs: float, batch: int = 32, rate: float = 1e-2) -> Network:
    """A network trained on these images."""
    network = Network()
    steps = max(1, int(epochs * len(images) / batch))
    optimizer = torch.optim.Adam(network.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1)
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch,))
        optimizer.zero_grad()
        margin_loss(network(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    return network


@torch.no_grad()
def accuracy(network: Network, images: Tensor, labels: Tensor) -> float:
    return (network(images).norm(dim=-1).argmax(1) == labels).float().mean().item()


def train(epochs: float) -> float:
    """Accuracy on the test images."""
    torch.manual_seed(0)
    images, labels, test_images, test_labels = digits()
    return accuracy(fit(images, labels, epochs), test_images, test_labels)


def compare(batch: int = 64) -> str:
    """The hidden layer beside the plain one, forward and backward, on one batch."""
    torch.manual_seed(0)
    network = Network()
    u = network.primary(digits()[0][:batch]).detach().requires_grad_()
    layer = network.hidden
    forms = (
        lambda: layer(u).sum().backward(),
        lambda: plain_layer(u, layer.weight, layer.bias, stride=2, padding=1).sum().backward(),
    )
    return side_by_side(*forms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=float, default=25)
    print(f"test accuracy: {train(parser.parse_args().epochs):.1%}")
    print(f"the hidden layer, forward and backward: {compare()}")


if __name__ == "__main__":
    main()
