"""The capsule layers of public repositories against the capsops call that replaces each: time and memory.

The layers are those of tests/peers, at the repositories' own sizes. A replacement has the weights in the
layout of capsops, as RoutingCapsules.from_weight leaves them. The time is CPU time.
"""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.measure import StartRace
from benchmarks.rows import Row, Target
from capsops import dispatch
from capsops.measuring.comparison import relative_error
from capsops.measuring.passes import BOTH, run
from capsops.measuring.timing import cpu_clock
from tests.peers import infocapsgan, minglin_chen, segcaps
from tests.peers.peer import Peer
from tests.peers.table import PEERS

RATIOS = (17, 12)  # to be reached: forward, forward and backward
FEW_CAPSULES = 2  # the same for routing among four capsules
AMONG_FOUR = (segcaps.ROUTING_ONLY, minglin_chen.ONE_POSITION)
WITHOUT_TARGET = (  # no routing, or a convolution that takes the same time in both
    infocapsgan.REAL_OR_FAKE,
    infocapsgan.GEN_CAPSULES,
    segcaps.CONV_CAPSULE_LAYER,
    minglin_chen.CAPS_CONV_2D,
)


def leaves(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.detach().contiguous().requires_grad_() for x in tensors)


def target(peer: Peer, passes: str) -> float | None:
    if peer in WITHOUT_TARGET:
        return None
    return FEW_CAPSULES if peer in AMONG_FOUR else RATIOS[BOTH.index(passes)]


@pytest.mark.parametrize("passes", BOTH)
@pytest.mark.parametrize("peer", PEERS, ids=str)
def test_layer(peer: Peer, passes: str, race: StartRace, report: Callable[[Row], None]) -> None:
    torch.manual_seed(0)
    inputs = leaves([x.float() for x in peer.short_inputs(peer.sizes)])
    converted = leaves(peer.convert(*inputs))
    layer = partial(peer.layer, eps=peer.eps)
    grad = torch.randn_like(layer(*inputs).detach())
    ours = partial(run, peer.replacement, passes, converted, grad)
    theirs = partial(run, layer, passes, inputs, grad)
    (value, *gradients), (want, *wanted) = ours(), theirs()
    expected = (want, *(peer.convert(*wanted) if wanted else ()))
    row = Row("public layers", "capsule layer", str(peer), passes, impl=dispatch.automatic("cpu"))
    row.error = max(map(relative_error, (value, *gradients), expected))
    assert row.error < max(1e-5, 3 * peer.difference)
    row.take_times(race({"ours": ours, "theirs": theirs}, clock=cpu_clock))
    if memory.available():
        row.memory, row.peers_memory = memory.peak_of(ours), {"theirs": memory.peak_of(theirs)}
    if (ratio := target(peer, passes)) is not None:
        row.targets.append(Target("ratio", ratio, row.ratio))
    report(row)
