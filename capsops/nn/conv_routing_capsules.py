"""ConvRoutingCapsules: a convolutional layer of capsules with routing by agreement."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from capsops import functional
from capsops.nn._initial import initialise
from capsops.nn._sizes import check_size, check_sizes
from capsops.ops._shared_checks import check_layout, check_logits_shape, refuse_shape

Pair = tuple[int, int]


def _windows(u: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, fill: float = 0) -> Tensor:
    """The capsules under the kernel at each position [B, H′, W′, C, kh, kw, K], contiguous."""
    tall, wide = padding
    # K last, before the capsules are repeated: what is copied then is whole capsules.
    maps = F.pad(u.permute(0, 3, 4, 1, 2), (0, 0, 0, 0, wide, wide, tall, tall), value=fill).contiguous()
    for axis, (size, step) in enumerate(zip(kernel_size, stride, strict=True), start=1):
        maps = maps.unfold(axis, size, step)
    return maps.permute(0, 1, 2, 3, 5, 6, 4).contiguous()


@fx.wrap  # one call for torch.fx, whose proxies are never None
def _windows_of_mask(
    mask: Tensor | None, u: Tensor, kernel_size: Pair, stride: Pair, padding: Pair
) -> Tensor | None:
    """The mask of the capsules under the kernel [B · H′ · W′, I]; capsules of the padding are present."""
    if mask is None:
        return None
    check_layout("mask", mask)
    batch, in_capsules, _, height, width = u.shape
    if mask.shape != (batch, in_capsules, height, width):
        refuse_shape("mask", mask, "BCHW", batch, in_capsules, height, width)
    return _windows(mask.unsqueeze(2), kernel_size, stride, padding, fill=1).flatten(0, 2).flatten(1)


@fx.wrap
def _logits_of_windows(logits: Tensor | None, windows: Tensor, out_capsules: int) -> Tensor | None:
    """Logits that broadcast to [B, H′, W′, I, J] as ones that broadcast to [B · H′ · W′, I, J]."""
    if logits is None:
        return None
    check_layout("logits", logits)
    positions = windows.shape[:3]
    in_capsules = windows.flatten(3, 5).shape[3]
    check_logits_shape(logits, ("B", "H′", "W′", "I", "J"), (*positions, in_capsules, out_capsules))
    if all(size == 1 for size in logits.shape[:-2]):  # the same at all positions: not repeated
        return logits.flatten(0, -3) if logits.dim() > 3 else logits
    return logits.expand(*positions, -1, -1).flatten(0, 2)


class ConvRoutingCapsules(nn.Module):
    """Routing by agreement under a kernel that slides over maps: u [B, C, K, H, W] → v [B, J, D, H′, W′].

    Each kernel offset has its own matrices, shared by all positions of the map. At each position the
    C · kh · kw capsules under the kernel are routed to J (Hinton, Sabour, Frosst 2018, section 4). H′ and W′
    are those of a convolution. Only the unfolded input is stored, kh · kw times the size of u at stride 1.
    See capsops.capsule_routing for the formula. The weights start normal, so that at first ‖s‖ is about 0.3
    when the input capsules are squashed normal vectors.

    Padding capsules are zero, as in public code: they add nothing to s, and their couplings stay uniform, or
    as `logits` set them.

    Args:
        in_capsules: C, types of input capsules: there is one of each type at each position of the map.
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
        self.kernel_size, self.stride = check_sizes("kernel_size", kernel_size), check_sizes("stride", stride)
        self.padding = check_sizes("padding", padding, least=0)
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

    def forward(self, u: Tensor, *, logits: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """v [B, J, D, H′, W′] of u [B, C, K, H, W]; the D numbers of a capsule lie together in memory.

        Args:
            u: maps of input capsules.
            logits: ℓ, the routing logits of the first pass, broadcast to [B, H′, W′, C · kh · kw, J], the
                shape of `couplings`, with the capsules in the order of `weight`. −inf closes a pair of
                capsules. Logits that are the same at all positions, such as [C · kh · kw, J], are not
                repeated in memory.
            mask: bool [B, C, H, W]; False marks an input capsule as absent: its value is ignored, and its
                gradient is 0. Capsules of the padding are present.

        Raises:
            TypeError: `logits` or `mask` is not a tensor, or of another dtype.
            ValueError: shapes or devices do not fit.
        """
        v = self._at_each_position(functional.capsule_routing, u, logits, mask, detach=self.detach)
        return v.permute(0, 3, 4, 1, 2)

    def couplings(self, u: Tensor, *, logits: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Coupling coefficients of the last pass [B, H′, W′, C · kh · kw, J]; those of absent capsules are 0.

        The C · kh · kw capsules are ordered type by type and, within a type, row by row.
        """
        return self._at_each_position(functional.couplings, u, logits, mask)

    def _at_each_position(
        self,
        function: Callable[..., Tensor],
        u: Tensor,
        logits: Tensor | None,
        mask: Tensor | None,
        **options: Any,
    ) -> Tensor:
        """The function's result for the capsules under the kernel, with axes [B, H′, W′, …]."""
        if isinstance(u, Tensor):  # no proxy of torch.fx
            self._check(u)
        slide = self.kernel_size, self.stride, self.padding
        windows = _windows(u, *slide)
        result = function(
            windows.flatten(0, 2).flatten(1, 3),
            self.weight.flatten(0, 2),
            self.bias,
            logits=_logits_of_windows(logits, windows, self.weight.shape[3]),
            mask=_windows_of_mask(mask, u, *slide),
            iterations=self.iterations,
            leaky=self.leaky,
            **options,
        )
        return result.unflatten(0, windows.shape[:3])

    def _check(self, u: Tensor) -> None:
        check_layout("u", u)
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
