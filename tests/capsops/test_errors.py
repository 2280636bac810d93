"""Every error of the public functions names the argument, what it got and what it takes."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import capsops

B, I, J, D, K = 2, 3, 4, 5, 6  # noqa: E741
S = torch.zeros(B, D)
U, W, BETA = torch.zeros(B, I, K), torch.zeros(I, J, D, K), torch.zeros(J, D)
U_HAT = torch.zeros(B, I, J, D)

squash, predictions = capsops.squash, capsops.predictions
dynamic_routing, capsule_routing, couplings = (
    capsops.dynamic_routing,
    capsops.capsule_routing,
    capsops.couplings,
)

WEIGHT = "takes [I, J, D, K]"
INPUT = "takes [B, I, K] with"
BIAS = "takes [J, D] with J = 4, D = 5"
COUNT = "takes 0 (no routing) to 1000"
FLOATS = "takes float32, bfloat16, float16 or float64"

# (function, arguments, options, error, message)
CASES: list[tuple[Callable, tuple, dict[str, Any], type[Exception], str]] = [
    # not a tensor
    (squash, ([1.0, 2.0],), {}, TypeError, "s: got list, takes a torch.Tensor"),
    (squash, (None,), {}, TypeError, "s: got NoneType, takes a torch.Tensor"),
    (predictions, (np.zeros((2, 3, 6)), W), {}, TypeError, "u: got ndarray, takes a torch.Tensor"),
    (predictions, (U, 1.0), {}, TypeError, "weight: got float, takes a torch.Tensor"),
    (predictions, (U, None), {}, TypeError, "weight: got NoneType, takes a torch.Tensor"),
    (dynamic_routing, (3,), {}, TypeError, "u_hat: got int, takes a torch.Tensor"),
    (dynamic_routing, (U_HAT, 0), {}, TypeError, "bias: got int, takes a torch.Tensor"),
    (capsule_routing, ("u", W), {}, TypeError, "u: got str, takes a torch.Tensor"),
    (capsule_routing, (U, (W,)), {}, TypeError, "weight: got tuple, takes a torch.Tensor"),
    (capsule_routing, (U, W, True), {}, TypeError, "bias: got bool, takes a torch.Tensor"),
    (couplings, (U, {}), {}, TypeError, "weight: got dict, takes a torch.Tensor"),
    # not a dense tensor
    (
        squash,
        (S.to_sparse(),),
        {},
        ValueError,
        "s: got layout torch.sparse_coo, takes torch.strided: a dense tensor",
    ),
    (
        capsule_routing,
        (U, W, BETA.to_sparse()),
        {},
        ValueError,
        "bias: got layout torch.sparse_coo, takes torch.strided: a dense tensor",
    ),
    # dtypes
    (
        predictions,
        (U.to("meta"), W.double().to("meta")),
        {},
        TypeError,
        "weight: got dtype torch.float64, takes that of u, which is torch.float32",
    ),
    (
        predictions,
        (U.to("meta"), W.half().to("meta")),
        {},
        TypeError,
        "weight: got dtype torch.float16, takes that of u, which is torch.float32",
    ),
    (squash, (S.int(),), {}, ValueError, f"s: got dtype torch.int32, {FLOATS}"),
    (squash, (S.bool(),), {}, ValueError, f"s: got dtype torch.bool, {FLOATS}"),
    (squash, (S.to(torch.complex64),), {}, ValueError, f"s: got dtype torch.complex64, {FLOATS}"),
    (squash, (S.to(torch.float8_e4m3fn),), {}, ValueError, f"s: got dtype torch.float8_e4m3fn, {FLOATS}"),
    (predictions, (U, W.long()), {}, ValueError, f"weight: got dtype torch.int64, {FLOATS}"),
    (capsule_routing, (U, W, BETA.int()), {}, ValueError, f"bias: got dtype torch.int32, {FLOATS}"),
    (
        predictions, (U, W.double()), {}, TypeError,
        "weight: got dtype torch.float64, takes that of u, which is torch.float32",
    ),
    (
        dynamic_routing, (U_HAT.half(), BETA), {}, TypeError,
        "bias: got dtype torch.float32, takes that of u_hat, which is torch.float16",
    ),
    (
        capsule_routing, (U, W, BETA.bfloat16()), {}, TypeError,
        "bias: got dtype torch.bfloat16, takes that of u, which is torch.float32",
    ),
    (
        couplings, (U.bfloat16(), W, BETA), {}, TypeError,
        "weight: got dtype torch.float32, takes that of u, which is torch.bfloat16",
    ),
    # devices
    (
        predictions, (U, W.to("meta")), {}, ValueError,
        "weight: got device meta, takes that of u, which is cpu",
    ),
    (
        capsule_routing, (U, W, BETA.to("meta")), {}, ValueError,
        "bias: got device meta, takes that of u, which is cpu",
    ),
    # shapes
    (
        squash, (torch.tensor(1.0),), {}, ValueError,
        "s: got a scalar, takes a tensor with at least one dimension",
    ),
    (squash, (S, 2), {}, ValueError, "dim: got 2, takes -2 to 1 for a tensor of shape [2, 5]"),
    (squash, (S, -3), {}, ValueError, "dim: got -3, takes -2 to 1 for a tensor of shape [2, 5]"),
    (predictions, (U[0], W), {}, ValueError, f"u: got shape [3, 6], {INPUT} I = 3, K = 6"),
    (predictions, (U, W[0]), {}, ValueError, f"weight: got shape [4, 5, 6], {WEIGHT}"),
    (
        predictions, (U, W[:2]), {}, ValueError,
        f"u: got shape [2, 3, 6], {INPUT} I = 2, K = 6",
    ),
    (
        predictions, (U, W[..., :5]), {}, ValueError,
        f"u: got shape [2, 3, 6], {INPUT} I = 3, K = 5",
    ),
    (
        dynamic_routing, (U_HAT[0],), {}, ValueError,
        "u_hat: got shape [3, 4, 5] without `bias` or `logits` […, J], takes [B, I, J, D], or [B, I, D] with"
        " one of them, which tells J",
    ),
    (
        dynamic_routing, (U_HAT[0, 0],), {}, ValueError,
        "u_hat: got shape [4, 5], takes [B, I, J, D], or [B, I, D] for all j",
    ),
    (
        dynamic_routing, (U_HAT, BETA.T), {}, ValueError,
        f"bias: got shape [5, 4], {BIAS}",
    ),
    (dynamic_routing, (U_HAT, BETA[0]), {}, ValueError, f"bias: got shape [5], {BIAS}"),
    (capsule_routing, (U[0], W), {}, ValueError, f"u: got shape [3, 6], {INPUT} I = 3, K = 6"),
    (
        capsule_routing, (U, W.mT), {}, ValueError,
        f"u: got shape [2, 3, 6], {INPUT} I = 3, K = 5",
    ),
    (
        capsule_routing, (U, W, BETA[None]), {}, ValueError,
        f"bias: got shape [1, 4, 5], {BIAS}",
    ),
    (couplings, (U, W, BETA.T), {}, ValueError, f"bias: got shape [5, 4], {BIAS}"),
    (
        capsule_routing, (U, W[0, ..., :5]), {}, ValueError,
        "weight: got shape [4, 5, 5], takes [J, D, K] with K = 6",
    ),
    (
        couplings, (U, W[:1, ..., :5]), {}, ValueError,
        "weight: got shape [1, 4, 5, 5], takes [1, J, D, K] with K = 6",
    ),
    # starting logits and mask
    (dynamic_routing, (U_HAT,), {"logits": [0.0]}, TypeError, "logits: got list, takes a torch.Tensor"),
    (capsule_routing, (U, W), {"logits": 0.0}, TypeError, "logits: got float, takes a torch.Tensor"),
    (couplings, (U, W), {"logits": np.zeros(4)}, TypeError, "logits: got ndarray, takes a torch.Tensor"),
    (dynamic_routing, (U_HAT,), {"mask": True}, TypeError, "mask: got bool, takes a torch.Tensor"),
    (capsule_routing, (U, W), {"mask": [[True]]}, TypeError, "mask: got list, takes a torch.Tensor"),
    (
        dynamic_routing, (U_HAT,), {"logits": torch.zeros(3)}, ValueError,
        "logits: got shape [3], takes a shape that broadcasts to [B, I, J] with B = 2, I = 3, J = 4",
    ),
    (
        capsule_routing, (U, W), {"logits": torch.zeros(4).half()}, TypeError,
        "logits: got dtype torch.float16, takes that of u, which is torch.float32",
    ),
    (
        couplings, (U, W), {"logits": torch.zeros(4, device="meta")}, ValueError,
        "logits: got device meta, takes that of u, which is cpu",
    ),
    (
        capsule_routing, (U, W), {"mask": torch.ones(2, 3)}, TypeError,
        "mask: got dtype torch.float32, takes torch.bool: True where an input capsule is present",
    ),
    (
        dynamic_routing, (U_HAT,), {"mask": torch.ones(3) > 0}, ValueError,
        "mask: got shape [3], takes [B, I] with B = 2, I = 3",
    ),
    (
        couplings, (U, W), {"mask": torch.ones(2, 3, dtype=torch.bool, device="meta")}, ValueError,
        "mask: got device meta, takes that of u, which is cpu",
    ),
    # flags
    (capsule_routing, (U, W), {"squash_output": 1}, TypeError, "squash_output: got int, takes a bool"),
    (
        dynamic_routing, (U_HAT,), {"squash_output": None}, TypeError,
        "squash_output: got NoneType, takes a bool",
    ),
    # iterations
    (dynamic_routing, (U_HAT,), {"iterations": -1}, ValueError, f"iterations: got -1, {COUNT}"),
    (capsule_routing, (U, W), {"iterations": -2}, ValueError, f"iterations: got -2, {COUNT}"),
    (couplings, (U, W), {"iterations": -1}, ValueError, f"iterations: got -1, {COUNT}"),
    (dynamic_routing, (U_HAT,), {"iterations": 1.0}, TypeError, "iterations: got float, takes an int"),
    (capsule_routing, (U, W), {"iterations": "3"}, TypeError, "iterations: got str, takes an int"),
    (capsule_routing, (U, W), {"iterations": True}, TypeError, "iterations: got bool, takes an int"),
    (couplings, (U, W), {"iterations": None}, TypeError, "iterations: got NoneType, takes an int"),
]  # fmt: skip

ALL_FUNCTIONS = [
    (squash, (S,)),
    (predictions, (U, W)),
    (dynamic_routing, (U_HAT, BETA)),
    (capsule_routing, (U, W, BETA)),
    (couplings, (U, W, BETA)),
]


@pytest.mark.parametrize(("function", "args", "options", "error", "message"), CASES)
def test_invalid_arguments(
    function: Callable, args: tuple, options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        function(*args, **options)


@pytest.mark.parametrize(("function", "args"), ALL_FUNCTIONS)
def test_valid_arguments_are_accepted(function: Callable, args: tuple) -> None:
    assert function(*args).isfinite().all()


@pytest.mark.parametrize(("function", "args"), ALL_FUNCTIONS)
def test_unknown_impl(function: Callable, args: tuple) -> None:
    with pytest.raises(ValueError, match=r"^impl: got 'gpu', takes one of 'auto', 'reference', 'cpu', "):
        function(*args, impl="gpu")


@pytest.mark.parametrize(("function", "args"), ALL_FUNCTIONS)
def test_a_backend_that_cannot_compute_a_call_is_never_replaced(function: Callable, args: tuple) -> None:
    """There are no CUDA kernels for CPU tensors, whether the extension is built or not."""
    with pytest.raises(
        (ValueError, RuntimeError), match=r"impl='cuda' (is not available: .|takes tensors on cuda)"
    ):
        function(*args, impl="cuda")


@pytest.mark.parametrize(("function", "args"), ALL_FUNCTIONS)
def test_options_are_keyword_only(function: Callable, args: tuple) -> None:
    """An option without its keyword is an error."""
    with pytest.raises(TypeError, match="positional argument"):
        function(*args, 3, 3, 3)
