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


def routing_call(emulated: Emulated, **changes: Any) -> Any:
    arguments = {
        "B": B, "I": I, "J": J, "D": D, "K": K, "iterations": T, "leaky": False, "detach": False,
        "dtype": 0, "tf32": False,
    }  # fmt: skip
    return emulated.extension.RoutingCall(**{**arguments, **changes})


def test_tensors_of_routing(emulated: Emulated) -> None:
    call = routing_call(emulated)
    call.point(**MEMORY)
    for name, size in BYTES.items():
        for wrong in ((ADDRESS, size - 4), (ADDRESS, size + 4), (ADDRESS, -size), (0, size), (ADDRESS, 0)):
            with pytest.raises(ValueError, match=rf"^{name if name != 'weight' else '(weight|u)'}: got "):
                call.point(**{**MEMORY, name: wrong})
    with pytest.raises(ValueError, match="^u: got"):  # without weight, u is the predictions
        call.point(**{**MEMORY, "weight": (0, 0)})


def test_half_as_many_bytes_in_16_bit(emulated: Emulated) -> None:
    with pytest.raises(ValueError, match=r"^\w+: got \d+ bytes at address 4096, takes \d+ bytes$"):
        routing_call(emulated, dtype=1).point(**MEMORY)


@pytest.mark.parametrize("name", ["B", "I", "J", "D", "K"])
def test_sizes_of_routing(emulated: Emulated, name: str) -> None:
    for size in (0, -1, 2**62):
        sizes = {"B": B, "I": I, "J": J, "D": D, "K": K} | {name: size}
        got = re.escape(str(list(sizes.values())))
        with pytest.raises(ValueError, match=f"^shape: got sizes {got}, takes positive ones"):
            routing_call(emulated, **{name: size})


def test_values_of_routing(emulated: Emulated) -> None:
    for iterations in (-1, 1001, 2**62):
        with pytest.raises(ValueError, match=rf"^iterations: got {iterations}, takes 0 to 1000$"):
            routing_call(emulated, iterations=iterations)
    for dtype in (-1, 3):
        with pytest.raises(ValueError, match=rf"^dtype: got {dtype}, takes 0 to 2$"):
            routing_call(emulated, dtype=dtype)


def test_a_run_without_its_tensors_or_workspace(emulated: Emulated) -> None:
    op = emulated.extension.RoutingOp
    emulated.device.set()
    for kind, needed in ((op.forward, "v"), (op.backward, "grad"), (op.couplings, "couplings")):
        call = routing_call(emulated)
        call.point(**{**MEMORY, needed: (0, 0)})
        with pytest.raises(ValueError, match=f"^{needed}: got none, takes one$"):
            call.run(kind, (ADDRESS, 1 << 40), 0, 0)
        call.point(**MEMORY)
        size = call.workspace(kind, 0)
        assert size > 0
        for wrong in ((ADDRESS, size - 1), (0, size), (0, 0)):
            with pytest.raises(ValueError, match="^workspace: got"):
                call.run(kind, wrong, 0, 0)


def test_tensors_of_the_other_ops(emulated: Emulated) -> None:
    extension, missing = emulated.extension, (0, 0)
    s = (ADDRESS, 4 * 3 * 5 * 7)
    for n in range(3):
        arguments = [s, s, s]
        arguments[n] = (ADDRESS, s[1] - 4)
        with pytest.raises(ValueError, match=r"^(s|grad|out): got 416 bytes"):
            extension.squash(*arguments, 3, 5, 7, 0, 0, 0)
    with pytest.raises(ValueError, match="^out: got 0 bytes"):
        extension.squash(s, missing, missing, 3, 5, 7, 0, 0, 0)
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
