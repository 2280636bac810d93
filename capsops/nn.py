"""Capsule layers as ordinary torch modules."""

import math

import torch
from torch import Tensor, nn

from capsops import functional


class Squash(nn.Module):
    """capsops.squash as a module.

    Args:
        dim: the dimension along which a vector lies.
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, s: Tensor) -> Tensor:
        return functional.squash(s, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class PrimaryCapsules(nn.Module):
    """A convolution whose channels are grouped into capsules: images [B, C, H, W] → u [B, I, K], squashed.

    A capsule is `dim` channels at one place, not `dim` places of one channel. I = capsules × H′ × W′, ordered
    type by type and, within a type, row by row (Sabour, Frosst, Hinton 2017, section 4).

    Args:
        in_channels: C, channels of the input.
        capsules: number of capsule types.
        dim: K, the dimension of a capsule.
        kernel_size: of the convolution, in pixels.
        stride: of the convolution, in pixels.
    """

    def __init__(self, in_channels: int, capsules: int, dim: int, kernel_size: int, stride: int = 2) -> None:
        super().__init__()
        self.capsules, self.dim = capsules, dim
        self.conv = nn.Conv2d(in_channels, capsules * dim, kernel_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x.unflatten(1, (self.capsules, self.dim)).flatten(3).transpose(2, 3)
        return functional.squash(x.flatten(1, 2))


class RoutingCapsules(nn.Module):
    """A layer of capsules with routing by agreement: u [B, I, K] → v [B, J, D].

    Public code calls it DigitCaps or ClassCapsules. See capsops.capsule_routing for the formula. The weights
    start normal, so that at first ‖s‖ is about 0.3 when the input capsules are squashed normal vectors.

    Args:
        in_capsules: I.
        out_capsules: J.
        in_dim: K.
        out_dim: D.
        iterations: number of softmax passes; 0 means no routing, every coupling is 1.
        bias: whether to add a learned β [J, D] to s.
        leaky: whether an orphan class takes part in the softmax.
        detach: whether the couplings are kept out of the gradient.

    Raises:
        TypeError: an option is of another type.
        ValueError: `iterations` is negative.
    """

    def __init__(
        self,
        in_capsules: int,
        out_capsules: int,
        in_dim: int,
        out_dim: int,
        *,
        iterations: int = 3,
        bias: bool = True,
        leaky: bool = False,
        detach: bool = False,
    ) -> None:
        super().__init__()
        functional.check_options(iterations, leaky=leaky, detach=detach)
        self.iterations, self.leaky, self.detach = iterations, leaky, detach
        self.weight = nn.Parameter(torch.empty(in_capsules, out_capsules, out_dim, in_dim))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_capsules, out_dim))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew; the bias becomes 0."""
        in_capsules, out_capsules, out_dim, in_dim = self.weight.shape
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.weight.numel() == 0:
            return
        coupling = 1.0 if self.iterations == 0 else 1 / (out_capsules + self.leaky)
        length = in_dim / (in_dim + 1)  # of a squashed normal vector, about
        nn.init.normal_(self.weight, std=0.3 / (coupling * length * math.sqrt(in_capsules * out_dim)))

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        layout: str,
        *,
        bias: Tensor | None = None,
        iterations: int = 3,
        leaky: bool = False,
        detach: bool = False,
    ) -> "RoutingCapsules":
        """A layer with weights trained elsewhere, whose axes stand in another order.

        Args:
            weight: the transformation matrices.
            layout: a letter for each axis of `weight`: I, J, D, K once each, and 1 for an axis of size 1. The
                layouts met in public code are "JIDK", "JIKD", "1IJDK" and "1JIDK".
            bias: β with J · D elements, in the order of J and then D.
            iterations, leaky, detach: as for the class.

        Raises:
            TypeError: `weight` or `bias` is not a tensor, or an option is of another type.
            ValueError: `layout` does not name the axes of `weight`, or `bias` does not have J · D elements.
        """
        for name, x in (("weight", weight), ("bias", bias)):
            if not isinstance(x, Tensor) and not (name == "bias" and x is None):
                raise TypeError(f"{name}: got {type(x).__name__}, takes a torch.Tensor")
        if sorted(layout.replace("1", "")) != sorted("IJDK") or len(layout) != weight.dim():
            raise ValueError(
                f"layout: got {layout!r} for a weight of shape {list(weight.shape)}, takes a letter for each"
                " axis: I, J, D, K once each, and 1 for an axis of size 1"
            )
        ones = [axis for axis, letter in enumerate(layout) if letter == "1"]
        if any(weight.shape[axis] != 1 for axis in ones):
            raise ValueError(
                f"layout: got {layout!r}, where 1 stands for an axis that is not 1 in {list(weight.shape)}"
            )
        weight = (
            weight.detach().squeeze(ones).permute([layout.replace("1", "").index(axis) for axis in "IJDK"])
        )
        in_capsules, out_capsules, out_dim, in_dim = weight.shape
        if bias is not None and bias.numel() != out_capsules * out_dim:
            raise ValueError(f"bias: got {bias.numel()} elements, takes J · D = {out_capsules * out_dim}")
        layer = cls(
            in_capsules,
            out_capsules,
            in_dim,
            out_dim,
            iterations=iterations,
            bias=bias is not None,
            leaky=leaky,
            detach=detach,
        ).to(weight)
        with torch.no_grad():
            layer.weight.copy_(weight)
            if bias is not None:
                layer.bias.copy_(bias.reshape(out_capsules, out_dim))
        return layer

    def forward(self, u: Tensor) -> Tensor:
        return functional.capsule_routing(
            u, self.weight, self.bias, iterations=self.iterations, leaky=self.leaky, detach=self.detach
        )

    def couplings(self, u: Tensor) -> Tensor:
        """Coupling coefficients of the last pass [B, I, J]."""
        return functional.couplings(u, self.weight, self.bias, iterations=self.iterations, leaky=self.leaky)

    def extra_repr(self) -> str:
        in_capsules, out_capsules, out_dim, in_dim = self.weight.shape
        return (
            f"{in_capsules}, {out_capsules}, in_dim={in_dim}, out_dim={out_dim}, "
            f"iterations={self.iterations}, bias={self.bias is not None}, "
            f"leaky={self.leaky}, detach={self.detach}"
        )
