"""capsops._cuda takes each tensor with its length; a wrong one is an error before any kernel runs."""

import re
from typing import Any

import pytest

from tests.cuda_emulator.emulated import Emulated

B, I, J, D, K, T = 2, 3, 4, 5, 6, 3  # noqa: E741
# An address that no kernel may access: every call here raises an error.
ADDRESS = 4096
BYTES = {
    "u": 4 * B * I * K, "weight": 4 * I * J * D * K, "bias": 4 * J * D, "s": 4 * T * B * J * D,
    "v": 4 * B * J * D, "couplings": 4 * B * I * J, "grad": 4 * B * J * D, "grad_u": 4 * B * I * K,
    "grad_weight": 4 * I * J * D * K, "grad_bias": 4 * J * D,
}  # fmt: skip
MEMORY = {name: (ADDRESS, size) for name, size in BYTES.items()}
SIZES = {"B": B, "I": I, "J": J, "D": D, "K": K}
MISSING = (0, 0)
TENSORS = {
    "routing": ("u", "weight", "bias", "v", "s"),
    "routing_backward": ("grad", "u", "weight", "s", "grad_u", "grad_weight", "grad_bias"),
    "couplings": ("u", "weight", "bias", "couplings"),
}
SETTINGS = {
    "routing": {"leaky": False, "squash_output": True},
    "routing_backward": {"leaky": False, "detach": False, "squash_output": True},
    "couplings": {"leaky": False},
}


def call(emulated: Emulated, kernel: str, **changes: Any) -> int:
    """Calls a kernel of routing without workspace, so that it only says how much it takes."""
    arguments = {
        **{name: MEMORY[name] for name in TENSORS[kernel]}, "options": None, **SIZES, "iterations": T,
        **SETTINGS[kernel], "dtype": 0, "tf32": False, "workspace": MISSING, "device": 0, "stream": 0,
    }  # fmt: skip
    assert changes.keys() <= arguments.keys()
    emulated.device.set()
    return getattr(emulated.extension, kernel)(*{**arguments, **changes}.values())


@pytest.mark.parametrize(("kernel", "name"), [(x, name) for x in TENSORS for name in TENSORS[x]])
def test_tensors_of_routing(emulated: Emulated, kernel: str, name: str) -> None:
    assert call(emulated, kernel) > 0
    size = BYTES[name]
    for wrong in ((ADDRESS, size - 4), (ADDRESS, size + 4), (ADDRESS, -size), (0, size), (ADDRESS, 0)):
        with pytest.raises(ValueError, match=rf"^{name if name != 'weight' else '(weight|u)'}: got "):
            call(emulated, kernel, **{name: wrong})


@pytest.mark.parametrize("kernel", TENSORS)
def test_tensors_that_may_be_missing(emulated: Emulated, kernel: str) -> None:
    for name in set(TENSORS[kernel]) - {"bias", "grad_u", "grad_weight", "weight"}:
        with pytest.raises(ValueError, match=rf"^{name}: got (none, takes one|0 bytes)"):
            call(emulated, kernel, **{name: MISSING})
    for name in set(TENSORS[kernel]) & {"bias", "grad_u", "grad_weight"}:
        assert call(emulated, kernel, **{name: MISSING}) > 0
    with pytest.raises(ValueError, match="^u: got"):  # without weight, u is the predictions
        call(emulated, kernel, weight=MISSING)


@pytest.mark.parametrize("kernel", TENSORS)
def test_half_as_many_bytes_in_16_bit(emulated: Emulated, kernel: str) -> None:
    with pytest.raises(ValueError, match=r"^\w+: got \d+ bytes at address 4096, takes \d+ bytes$"):
        call(emulated, kernel, dtype=1)


@pytest.mark.parametrize("kernel", TENSORS)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_routing(emulated: Emulated, kernel: str, name: str) -> None:
    for size in (0, -1, 2**62):
        got = re.escape(str(list({**SIZES, name: size}.values())))
        with pytest.raises(ValueError, match=f"^shape: got sizes {got}, takes positive ones"):
            call(emulated, kernel, **{name: size})


@pytest.mark.parametrize("kernel", TENSORS)
def test_values_of_routing(emulated: Emulated, kernel: str) -> None:
    for iterations in (-1, 1001, 2**62):
        with pytest.raises(ValueError, match=rf"^iterations: got {iterations}, takes 0 to 1000$"):
            call(emulated, kernel, iterations=iterations)
    for dtype in (-1, 3):
        with pytest.raises(ValueError, match=rf"^dtype: got {dtype}, takes 0 to 2$"):
            call(emulated, kernel, dtype=dtype)


def test_couplings_of_one_pass(emulated: Emulated) -> None:
    for iterations in (0, 1):
        with pytest.raises(ValueError, match=rf"^iterations: got {iterations}, takes 2 or more without"):
            call(emulated, "couplings", iterations=iterations)


@pytest.mark.parametrize("kernel", TENSORS)
def test_workspace(emulated: Emulated, kernel: str) -> None:
    """Nothing is run where it is too short: the tensors here must not be read."""
    size = call(emulated, kernel)
    assert call(emulated, kernel, workspace=(ADDRESS, size - 1)) == size
    for wrong in ((0, size), (ADDRESS, 0), (ADDRESS, -1)):
        with pytest.raises(ValueError, match="^workspace: got"):
            call(emulated, kernel, workspace=wrong)


@pytest.mark.parametrize("kernel", TENSORS)
def test_options_that_the_kernels_do_not_compute(emulated: Emulated, kernel: str) -> None:
    mask, logits, none = (ADDRESS, B * I), (ADDRESS, 4 * I * J), ((1, 1, 1), (0, 0, 0), MISSING)
    sizes = (1, I, J), (0, J, 1), MISSING
    shared = {"weight": (ADDRESS, BYTES["weight"] // I)} | (
        {"grad_weight": (ADDRESS, BYTES["weight"] // I)} if kernel == "routing_backward" else {}
    )
    for name, options, changes in (
        ("shared", (True, MISSING, MISSING, *none), shared),
        ("mask", (False, mask, MISSING, *none), {}),
        ("logits", (False, MISSING, logits, *sizes), {}),
    ):
        with pytest.raises(ValueError, match=rf"^options: got {name}.*, takes none on a CUDA device$"):
            call(emulated, kernel, options=options, **changes)
    if kernel != "couplings":
        with pytest.raises(ValueError, match="^options: got squash_output=False, takes none"):
            call(emulated, kernel, squash_output=False)
    for wrong in ((False, (ADDRESS, 5), MISSING, *none), (False, MISSING, (ADDRESS, 4 * I * J - 4), *sizes)):
        with pytest.raises(ValueError, match=r"^(mask|logits): got"):
            call(emulated, kernel, options=wrong)


def test_tensors_of_the_other_ops(emulated: Emulated) -> None:
    extension = emulated.extension
    s = (ADDRESS, 4 * 3 * 5 * 7)
    for n in range(3):
        arguments = [s, s, s]
        arguments[n] = (ADDRESS, s[1] - 4)
        with pytest.raises(ValueError, match=r"^(s|grad|out): got 416 bytes"):
            extension.squash(*arguments, 3, 5, 7, 0, 0, 0)
    with pytest.raises(ValueError, match="^out: got 0 bytes"):
        extension.squash(s, MISSING, MISSING, 3, 5, 7, 0, 0, 0)
    u, weight, u_hat = MEMORY["u"], MEMORY["weight"], (ADDRESS, 4 * B * I * J * D)
    sizes = (B, I, J, D, K, 0, 0, 0)
    for name, arguments in (
        ("u", (u_hat, weight, u_hat)),
        ("weight", (u, u, u_hat)),
        ("u_hat", (u, weight, u)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got"):
            extension.predictions(*arguments, *sizes)
    for name, wrong in (("grad", 0), ("u", 1), ("weight", 2), ("grad_u", 3), ("grad_weight", 4)):
        arguments = [u_hat, u, weight, u, weight]
        arguments[wrong] = (ADDRESS, 4)
        with pytest.raises(ValueError, match=f"^{name}: got 4 bytes"):
            extension.predictions_backward(*arguments, *sizes)
