"""Squash: capsops.squash as a layer."""

from torch import Tensor, nn

from capsops import functional


class Squash(nn.Module):
    """capsops.squash as a module.

    Args:
        dim: the dimension along which a vector lies.

    Raises:
        TypeError: `dim` is not an int.
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = functional.as_int("dim", dim)

    def forward(self, s: Tensor) -> Tensor:
        return functional.squash(s, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
