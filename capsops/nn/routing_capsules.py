"""RoutingCapsules: a fully connected layer of capsules with routing by agreement."""

import re

import torch
from torch import Tensor, nn

from capsops import functional
from capsops.nn._initial import initialise
from capsops.nn._sizes import check_size
from capsops.ops._shared_checks import check_dense


def _split(weight: Tensor, layout: str, out_capsules: int | None) -> tuple[Tensor, str]:
    """A weight whose J and D share an axis, "(JD)" or "(DJ)", with an axis for each; others as they are."""
    axes = re.findall(r"\((?:JD|DJ)\)|.", layout)
    shared = [axis for axis, letters in enumerate(axes) if len(letters) > 1]
    if not shared and out_capsules is not None:
        raise ValueError(
            f"out_capsules: got {out_capsules}, takes None: in layout {layout!r} J is an axis by itself"
        )
    if not shared or len(axes) != weight.dim():  # from_weight raises the error for the latter
        return weight, layout
    if out_capsules is None:
        raise ValueError(f"out_capsules: got None, takes J: in layout {layout!r} it shares an axis with D")
    axis, J = shared[0], check_size("out_capsules", out_capsules)
    size = weight.shape[axis]
    if size % J:
        raise ValueError(
            f"out_capsules: got {J}, takes a divisor of {size}, the size of the axis of J and D in {layout!r}"
        )
    sizes = (J, size // J) if axes[axis] == "(JD)" else (size // J, J)
    return weight.unflatten(axis, sizes), layout.replace("(", "").replace(")", "")


class RoutingCapsules(nn.Module):
    """A layer of capsules with routing by agreement: u [B, I, K] → v [B, J, D].

    Public code calls it DigitCaps or ClassCapsules. See capsops.capsule_routing for the formula; for s in
    place of v, call that with `weight`, `bias` and squash_output=False. The weights start normal, so that at
    first ‖s‖ is about 0.3 when the input capsules are squashed normal vectors.

    Args:
        in_capsules: I.
        out_capsules: J.
        in_dim: K.
        out_dim: D.
        iterations: number of softmax passes, 0 to 1000; 0 means no routing, every coupling is 1.
        bias: whether to add a learned β [J, D] to s.
        leaky: whether an orphan class takes part in the softmax.
        detach: whether the couplings are kept out of the gradient.
        shared: whether all input capsules share one matrix for each output capsule, weight [J, D, K]. Such a
            layer takes any number of input capsules; `in_capsules` only sets how large the weights start.

    Raises:
        TypeError: a size or an option is of another type.
        ValueError: a size is below 1, or `iterations` is not in 0 to 1000.
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
        shared: bool = False,
    ) -> None:
        super().__init__()
        for name, flag in (("bias", bias), ("leaky", leaky), ("detach", detach), ("shared", shared)):
            functional.check_flag(name, flag)
        self.iterations, self.leaky, self.detach = functional.as_iterations(iterations), leaky, detach
        self.in_capsules, out_capsules = (
            check_size("in_capsules", in_capsules),
            check_size("out_capsules", out_capsules),
        )
        sizes = out_capsules, check_size("out_dim", out_dim), check_size("in_dim", in_dim)
        self.weight = nn.Parameter(torch.empty(sizes if shared else (self.in_capsules, *sizes)))
        if bias:
            self.bias = nn.Parameter(torch.empty(sizes[:2]))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @property
    def shared(self) -> bool:
        """Whether all input capsules share the weight."""
        return self.weight.dim() == 3

    def reset_parameters(self) -> None:
        """Draws the weights anew; the bias becomes 0."""
        initialise(self.weight, self.bias, self.in_capsules, self.iterations, self.leaky)

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        layout: str,
        *,
        bias: Tensor | None = None,
        out_capsules: int | None = None,
        iterations: int = 3,
        leaky: bool = False,
        detach: bool = False,
    ) -> "RoutingCapsules":
        """A layer with weights trained elsewhere, whose axes are in another order.

        Args:
            weight: the transformation matrices.
            layout: a letter for each axis of `weight`: I, J, D, K once each, and 1 for an axis of size 1. The
                layouts met in public code are "JIDK", "JIKD", "1IJDK" and "1JIDK". "(JD)" is one axis
                for both, D running fastest, as in "IK(JD)"; "(DJ)" the other way. Without I, as in "JDK", the
                layer is `shared`.
            bias: β [J, D], flat or with further axes of size 1 if need be, on the device of `weight`.
            out_capsules: J, needed where it shares an axis with D.
            iterations, leaky, detach: as for the class.

        Raises:
            TypeError: `weight` or `bias` is not a tensor, `layout` not a str, an option of another type.
            ValueError: `weight` or `bias` is not a dense tensor of floating-point numbers, `layout` does not
                name the axes of `weight`, an axis is empty, or `bias` is not [J, D] or on another device.
        """
        for name, x in (("weight", weight), ("bias", bias)):
            if name == "bias" and x is None:
                continue
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: got {type(x).__name__}, takes a torch.Tensor")
            check_dense(name, x)
        if not isinstance(layout, str):
            raise TypeError(f"layout: got {type(layout).__name__}, takes a str such as 'JIDK'")
        weight, layout = _split(weight, layout, out_capsules)
        order = "IJDK" if "I" in layout else "JDK"
        if sorted(layout.replace("1", "")) != sorted(order) or len(layout) != weight.dim():
            raise ValueError(
                f"layout: got {layout!r} for a weight of shape {list(weight.shape)}, takes a letter for each"
                " axis: I (unless the weight is shared), J, D, K once each, and 1 for an axis of size 1;"
                " (JD) or (DJ) for one axis of both"
            )
        shape = list(weight.shape)
        ones = [axis for axis, letter in enumerate(layout) if letter == "1"]
        if any(weight.shape[axis] != 1 for axis in ones):
            raise ValueError(f"layout: got {layout!r}, where 1 stands for an axis that is not 1 in {shape}")
        weight = (
            weight.detach().squeeze(ones).permute([layout.replace("1", "").index(axis) for axis in order])
        )
        if weight.numel() == 0:
            raise ValueError(f"weight: got shape {shape} in layout {layout!r}, takes no axis of size 0")
        out_capsules, out_dim, in_dim = weight.shape[-3:]
        if bias is not None:
            sizes = [n for n in bias.shape if n != 1]
            if sizes != [n for n in (out_capsules, out_dim) if n != 1] and sizes != [out_capsules * out_dim]:
                raise ValueError(
                    f"bias: got shape {list(bias.shape)}, takes [J, D] with J = {out_capsules} and"
                    f" D = {out_dim}, flat or with axes of size 1"
                )
            if bias.device != weight.device:
                raise ValueError(
                    f"bias: got device {bias.device}, takes that of weight, which is {weight.device}"
                )
        layer = cls(
            1 if order == "JDK" else weight.shape[0],
            out_capsules,
            in_dim,
            out_dim,
            iterations=iterations,
            bias=bias is not None,
            leaky=leaky,
            detach=detach,
            shared=order == "JDK",
        ).to(weight)
        with torch.no_grad():
            layer.weight.copy_(weight)
            if bias is not None:
                layer.bias.copy_(bias.reshape(out_capsules, out_dim))
        return layer

    def forward(self, u: Tensor, *, logits: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """v [B, J, D] of u [B, I, K]; `logits` and `mask` as for capsops.capsule_routing."""
        self._check(u)
        return functional.capsule_routing(
            u,
            self.weight,
            self.bias,
            logits=logits,
            mask=mask,
            iterations=self.iterations,
            leaky=self.leaky,
            detach=self.detach,
        )

    def couplings(self, u: Tensor, *, logits: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Coupling coefficients of the last pass [B, I, J]."""
        self._check(u)
        return functional.couplings(
            u,
            self.weight,
            self.bias,
            logits=logits,
            mask=mask,
            iterations=self.iterations,
            leaky=self.leaky,
        )

    def _check(self, u: Tensor) -> None:
        """A weight [1, J, D, K] is of one input capsule here; the function lets all capsules share it."""
        # With a proxy of torch.fx the weight is one too, and there is nothing to compare.
        of_one = isinstance(u, Tensor) and not self.shared and self.weight.shape[0] == 1
        if not of_one:
            return
        check_dense("u", u)
        if u.dim() == 3 and u.shape[1] != 1:
            raise ValueError(
                f"u: got shape {list(u.shape)}, takes [B, I, K] with I = 1 (shared=True takes any I)"
            )

    def extra_repr(self) -> str:
        out_capsules, out_dim, in_dim = self.weight.shape[-3:]
        return (
            f"{self.in_capsules}, {out_capsules}, in_dim={in_dim}, out_dim={out_dim}, "
            f"iterations={self.iterations}, bias={self.bias is not None}, "
            f"leaky={self.leaky}, detach={self.detach}" + (", shared=True" if self.shared else "")
        )
