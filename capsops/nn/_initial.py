"""How the weights of routing layers start."""

import math

from torch import Tensor, nn


def initialise(weight: Tensor, bias: Tensor | None, in_capsules: int, iterations: int, leaky: bool) -> None:
    """Draws weights […, J, D, K] so that ‖s‖ of the first pass is about 0.3; the bias becomes 0.

    Here the inputs are squashed normal vectors, `in_capsules` of them for each output capsule.
    """
    out_capsules, out_dim, in_dim = weight.shape[-3:]
    if bias is not None:
        nn.init.zeros_(bias)
    coupling = 1.0 if iterations == 0 else 1 / (out_capsules + leaky)
    length = in_dim / (in_dim + 1)  # of a squashed normal vector, about
    nn.init.normal_(weight, std=0.3 / (coupling * length * math.sqrt(in_capsules * out_dim)))
