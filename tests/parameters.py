"""What tests of the systems count."""

from torch import nn


def parameter_count(module: nn.Module) -> int:
    """How many numbers are trained in `module`."""
    return sum(parameter.numel() for parameter in module.parameters())
