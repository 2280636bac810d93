"""DTensors whose batch is divided between two processes."""

import socket

import pytest

from tests.processes import start_python
from tests.tiers import fast_only

WORLD = 2

# Each rank compares every op on sharded tensors with the same op on whole ones, and prints a line at the end.
CODE = """
import torch, torch.distributed as dist
import capsops
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)  # a sharded sum is rounded in another order
u, weight, bias = torch.randn(4, 6, 4), torch.randn(6, 3, 5, 4), torch.randn(3, 5)
u_hat = torch.randn(4, 6, 3, 5)
S, R = Shard(0), Replicate()
cases = {
    "squash": (capsops.squash, (u,), (S,)),
    "predictions": (capsops.predictions, (u, weight), (S, R)),
    "dynamic_routing": (lambda x, b: capsops.dynamic_routing(x, b, leaky=True), (u_hat, bias), (S, R)),
    "capsule_routing": (capsops.capsule_routing, (u, weight, bias), (S, R, R)),
    "without bias": (lambda u, w: capsops.capsule_routing(u, w, detach=True), (u, weight), (S, R)),
    "couplings": (capsops.couplings, (u, weight, bias), (S, R, R)),
    "logits [I, J]": (
        lambda u, w, l: capsops.capsule_routing(u, w, logits=l), (u, weight, torch.randn(6, 3)), (S, R, R)
    ),
    "logits [B, I, J] and a mask": (
        lambda u, w, l, m: capsops.capsule_routing(u, w, logits=l, mask=m),
        (u, weight, torch.randn(4, 6, 3), torch.randn(4, 6) > 0),
        (S, R, S, S),
    ),
    "a shared weight": (
        lambda u, w, b, l: capsops.capsule_routing(u, w, b, logits=l, squash_output=False),
        (u, weight[0], bias, torch.randn(4, 1, 3)),
        (S, R, R, S),
    ),
    "the same for all outputs": (
        lambda x, l, m: capsops.dynamic_routing(x, logits=l, mask=m),
        (u, torch.randn(1, 6, 3), torch.randn(4, 6) > 0),
        (S, R, S),
    ),
    "logits of û": (lambda x, l: capsops.dynamic_routing(x, logits=l), (u_hat, torch.randn(4, 6, 3)), (S, S)),
}
for name, (op, inputs, placements) in cases.items():
    whole = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    sharded = [
        distribute_tensor(x, mesh, [p]).requires_grad_(x.is_floating_point())
        for x, p in zip(inputs, placements)
    ]
    want = op(*whole)
    with CommDebugMode() as communication:
        got = op(*sharded)
        if name != "couplings":
            got.backward(torch.ones_like(got))
    assert communication.get_total_counts() == 0, (name, communication.get_comm_counts())
    assert got.placements == (S,), (name, got.placements)
    torch.testing.assert_close(got.full_tensor(), want)
    if name != "couplings":
        want.backward(torch.ones_like(want))
        for part, leaf, placement in zip(sharded, whole, placements):
            if not leaf.requires_grad:
                continue
            expected = S if placement == S else Partial()
            assert part.grad.placements == (expected,), (name, part.grad.placements)
            torch.testing.assert_close(part.grad.full_tensor(), leaf.grad)
dist.destroy_process_group()
print("all", len(cases), "are equal")
"""


@pytest.mark.parametrize("imports", fast_only([""], ["", "import torch.distributed.tensor\n"]))
def test_the_batch_is_sharded_without_communication(imports: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD)}
    common |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [start_python("-c", imports + CODE, RANK=str(rank), **common) for rank in range(WORLD)]
    for process in ranks:
        out, err = process.communicate(timeout=100)
        assert (process.returncode, out.strip().splitlines()[-1:]) == (0, ["all 11 are equal"]), err


def test_importing_capsops_does_not_import_dtensor() -> None:
    process = start_python(
        "-c", "import sys, capsops; print('torch.distributed.tensor' in sys.modules)", fresh=True
    )
    out, err = process.communicate(timeout=100)
    assert out.strip() == "False", err
