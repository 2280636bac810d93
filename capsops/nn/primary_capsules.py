"""PrimaryCapsules: the layer between a convolution and routing."""

from torch import Tensor, nn

from capsops import functional
from capsops.nn._sizes import check_size, check_sizes
from capsops.ops._shared_checks import check_layout


class PrimaryCapsules(nn.Module):
    """A convolution whose channels are grouped into capsules: images [B, C, H, W] → u [B, I, K], squashed.

    A capsule is `dim` channels at one position, not `dim` positions of one channel. I = capsules × H′ × W′,
    ordered type by type and, within a type, row by row (Sabour, Frosst, Hinton 2017, section 4).

    Args:
        in_channels: C, channels of the input.
        capsules: number of capsule types.
        dim: K, the dimension of a capsule.
        kernel_size: of the convolution, in pixels; two ints for height and width.
        stride: of the convolution, in pixels; two ints for height and width.
        padding: zeros on each side of the image, in pixels, 0 or more; two ints for height and width.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1, or `padding` below 0.
    """

    def __init__(
        self,
        in_channels: int,
        capsules: int,
        dim: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 2,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.capsules, self.dim = check_size("capsules", capsules), check_size("dim", dim)
        self.conv = nn.Conv2d(
            check_size("in_channels", in_channels),
            self.capsules * self.dim,
            check_sizes("kernel_size", kernel_size),
            check_sizes("stride", stride),
            check_sizes("padding", padding, least=0),
        )

    def forward(self, x: Tensor) -> Tensor:
        channels = self.conv.in_channels
        if isinstance(x, Tensor):  # no proxy of torch.fx
            check_layout("x", x)
            if x.dim() != 4 or x.shape[1] != channels:
                raise ValueError(f"x: got shape {list(x.shape)}, takes [B, C, H, W] with C = {channels}")
        x = self.conv(x)
        x = x.unflatten(1, (self.capsules, self.dim)).flatten(3).transpose(2, 3)
        return functional.squash(x.flatten(1, 2))
