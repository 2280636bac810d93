"""capsops and the layers of public repositories: the same values and gradients."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from tests.capsops.cases import value_and_gradients
from tests.capsops.compare import assert_all_close, largest
from tests.peers.adambielski import CAPS_LAYER
from tests.peers.peer import Peer
from tests.peers.table import PEERS

every_peer = pytest.mark.parametrize("peer", PEERS, ids=str)


def by_repository(peer: Peer, inputs: tuple[Tensor, ...], eps: float = 0.0) -> dict[str, Tensor]:
    return value_and_gradients(lambda *x: peer.layer(*x, eps=eps), inputs)


def by_capsops(peer: Peer, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return value_and_gradients(lambda *x: peer.replacement(*peer.convert(*x)), inputs)


@every_peer
def test_the_same_in_float64(peer: Peer) -> None:
    inputs = peer.inputs(peer.small)
    assert_all_close(by_capsops(peer, inputs), by_repository(peer, inputs), 1e-10)


@every_peer
def test_the_same_in_float32(peer: Peer) -> None:
    """Longer predictions make larger logits, and rounding then changes more than 1e-6, on either side."""
    inputs = tuple(x.float() for x in peer.short_inputs(peer.small))
    assert_all_close(by_capsops(peer, inputs), by_repository(peer, inputs), 1e-6)


@every_peer
def test_difference_by_the_epsilon_of_the_repository(peer: Peer) -> None:
    inputs = peer.short_inputs(peer.small)
    got, want = by_capsops(peer, inputs), by_repository(peer, inputs, peer.eps)
    for name, x in want.items():
        assert largest(got[name] - x) <= peer.difference * largest(x), name
    if peer.eps > 1e-12:  # below, rounding hides it
        assert max(largest(got[name] - x) / largest(x) for name, x in want.items()) > peer.difference / 100


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer.module], ids=str)
def test_a_layer_with_the_weights_of_the_repository(peer: Peer) -> None:
    u, *weights = peer.inputs(peer.small)
    layer = peer.module(*weights)
    starting = {"logits": weights[1]} if peer is CAPS_LAYER else {}
    want = by_repository(peer, (u, *weights))

    def call(u: Tensor, weight: Tensor) -> Tensor:
        return functional_call(layer, {"weight": weight}, u, starting)

    got = value_and_gradients(call, (u, layer.weight))
    _, want["gradient 1"], *_ = peer.convert(u, want["gradient 1"], *weights[1:])
    assert_all_close(got, {name: want[name] for name in got}, 1e-10)


# As docs/replace_your_routing_layer.md says.
NAN_VALUES = {
    "arogozhnikov/readable_capsnet",
    "adambielski/CapsNet-pytorch",
    "yongheng1991/3D-point-capsule-networks",
}
NAN_GRADIENTS = NAN_VALUES | {"danielhavir/capsule-network", "aymenx17/InfoCapsGAN"}


@every_peer
def test_values_and_gradients_at_s_of_0(peer: Peer) -> None:
    """With the repository's epsilon; those of capsops are always finite."""
    inputs = [x if n == 1 else torch.zeros_like(x) for n, x in enumerate(peer.inputs(peer.small))]
    for name, x in by_repository(peer, inputs, peer.eps).items():
        is_nan = peer.repository in (NAN_VALUES if name == "value" else NAN_GRADIENTS)
        assert (x.isnan() if is_nan else x.isfinite()).all(), name
    assert all(x.isfinite().all() for x in by_capsops(peer, inputs).values())


def test_the_repositories_are_those_of_the_page() -> None:
    """Of its first table, whose rows say which call replaces which layer."""
    page = Path(__file__).parents[2] / "docs" / "replace_your_routing_layer.md"
    heading = "## Which call replaces which layer\n"
    section = page.read_text(encoding="utf-8").split(heading)[1].split("\n## ")[0]
    named = re.findall(r"^\| ([\w.-]+/[\w.-]+): ", section, re.MULTILINE)
    assert set(named) == {peer.repository for peer in PEERS}
