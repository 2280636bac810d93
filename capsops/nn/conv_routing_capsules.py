"""ConvRoutingCapsules: a convolutional layer of capsules with routing by agreement."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capsops import functional
from capsops.nn._initial import initialise
from capsops.nn._sizes import check_size, check_sizes


def _pair(name: str, value: int | tuple[int, int], least: int = 1) -> tuple[int, int]:
    """A size for the height and one for the width."""
    sizes = check_sizes(name, value, least)
    return sizes if isinstance(sizes, tuple) else (sizes, sizes)


class ConvRoutingCapsules(nn.Module):
    """Routing by agreement under a kernel that slides over maps: u [B, C, K, H, W] → v [B, J, D, H′, W′].

    Every place of the kernel has matrices of its own, which all positions share, and at each position the
    C · kh · kw capsules under the kernel are routed to J (Hinton, Sabour, Frosst 2018, section 4). Neither
    their predictions nor matrices for each position are stored, only the input as the kernel meets it,
    kh · kw times the size of u at stride 1. H′ and W′ are those of a convolution. See capsops.capsule_routing
    for the formula. The weights start normal, so that at first ‖s‖ is about 0.3 when the input capsules are
    squashed normal vectors.

    A capsule of the padding is zero, as public code has it: its predictions are 0, so it adds nothing to s,
    and its couplings, which stay uniform, change nothing else.

    Args:
        in_capsules: C, types of input capsules: there is one of each type at each place of the map.
        out_capsules: J, types of output capsules.
        in_dim: K.
        out_dim: D.
        kernel_size: kh and kw, one int for both or two.
        stride: of the kernel; one int or two, for height and width.
        padding: zeros on each side of the map, 0 or more; one int or two, for height and width.
        iterations: number of softmax passes, 0 to 1000; 0 means no routing, every coupling is 1.
        bias: whether to add a learned β [J, D] to s.
        leaky: whether an orphan class takes part in the softmax.
        detach: whether the couplings are kept out of the gradient.

    Attributes:
        weight: [C, kh, kw, J, D, K].
        bias: β [J, D], or None.

    Raises:
        TypeError: a size or an option is of another type.
        ValueError: a size is below 1, `padding` below 0, or `iterations` not in 0 to 1000.
    """

    def __init__(
        self,
        in_capsules: int,
        out_capsules: int,
        in_dim: int,
        out_dim: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        *,
        iterations: int = 3,
        bias: bool = True,
        leaky: bool = False,
        detach: bool = False,
    ) -> None:
        super().__init__()
        for name, flag in (("bias", bias), ("leaky", leaky), ("detach", detach)):
            functional.check_flag(name, flag)
        self.iterations, self.leaky, self.detach = functional.as_iterations(iterations), leaky, detach
        in_capsules, out_capsules = (
            check_size("in_capsules", in_capsules),
            check_size("out_capsules", out_capsules),
        )
        in_dim, out_dim = check_size("in_dim", in_dim), check_size("out_dim", out_dim)
        self.kernel_size = _pair("kernel_size", kernel_size)
        self.stride, self.padding = _pair("stride", stride), _pair("padding", padding, least=0)
        self.weight = nn.Parameter(torch.empty(in_capsules, *self.kernel_size, out_capsules, out_dim, in_dim))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_capsules, out_dim))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew; the bias becomes 0."""
        capsules = self.weight.shape[:3].numel()
        initialise(self.weight, self.bias, capsules, self.iterations, self.leaky)

    def forward(self, u: Tensor) -> Tensor:
        """v [B, J, D, H′, W′] of u [B, C, K, H, W]; the D numbers of a capsule lie together in memory."""
        windows = self._windows(u)
        v = functional.capsule_routing(
            windows.flatten(0, 2).flatten(1, 3),
            self.weight.flatten(0, 2),
            self.bias,
            iterations=self.iterations,
            leaky=self.leaky,
            detach=self.detach,
        )
        return v.unflatten(0, windows.shape[:3]).permute(0, 3, 4, 1, 2)

    def couplings(self, u: Tensor) -> Tensor:
        """Coupling coefficients of the last pass [B, H′, W′, C · kh · kw, J]."""
        windows = self._windows(u)
        c = functional.couplings(
            windows.flatten(0, 2).flatten(1, 3),
            self.weight.flatten(0, 2),
            self.bias,
            iterations=self.iterations,
            leaky=self.leaky,
        )
        return c.unflatten(0, windows.shape[:3])

    def _windows(self, u: Tensor) -> Tensor:
        """The capsules under the kernel at each position [B, H′, W′, C, kh, kw, K], contiguous."""
        if isinstance(u, Tensor):  # no proxy of torch.fx
            self._check(u)
        tall, wide = self.padding
        # K last, before the capsules are repeated: what is copied then is whole capsules.
        maps = F.pad(u.permute(0, 3, 4, 1, 2), (0, 0, 0, 0, wide, wide, tall, tall)).contiguous()
        for axis, (size, step) in enumerate(zip(self.kernel_size, self.stride, strict=True), start=1):
            maps = maps.unfold(axis, size, step)
        return maps.permute(0, 1, 2, 3, 5, 6, 4).contiguous()

    def _check(self, u: Tensor) -> None:
        in_capsules, in_dim = self.weight.shape[0], self.weight.shape[-1]
        if u.dim() != 5 or u.shape[1] != in_capsules or u.shape[2] != in_dim:
            raise ValueError(
                f"u: got shape {list(u.shape)}, takes [B, C, K, H, W] with C = {in_capsules}, K = {in_dim}"
            )
        least = [size - 2 * pad for size, pad in zip(self.kernel_size, self.padding, strict=True)]
        if u.shape[3] < least[0] or u.shape[4] < least[1]:
            raise ValueError(
                f"u: got shape {list(u.shape)}, takes maps of {least[0]} × {least[1]} or more, so that the"
                " kernel fits into the padded map"
            )

    def extra_repr(self) -> str:
        in_capsules, *_, out_capsules, out_dim, in_dim = self.weight.shape
        return (
            f"{in_capsules}, {out_capsules}, in_dim={in_dim}, out_dim={out_dim}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"iterations={self.iterations}, bias={self.bias is not None}, "
            f"leaky={self.leaky}, detach={self.detach}"
        )
