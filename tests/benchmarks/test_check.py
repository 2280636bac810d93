"""A wrong result is not let through."""

import pytest
import torch

from benchmarks import cases, peers
from benchmarks.cases import RoutingCase, bound, exact, plain
from benchmarks.check import check
from benchmarks.measure import measure
from benchmarks.passes import BOTH, FORWARD_BACKWARD, run
from benchmarks.rows import Row
from benchmarks.timing import Race

SMALL = RoutingCase(5, 7, 3, 4, 6)


def test_one_wrong_element_is_found() -> None:
    x = torch.randn(1000)
    wrong = x.clone()
    wrong[123] += 1e-3
    exact = x.double()
    assert check("same", [x], [x], [exact], 8) == 0
    with pytest.raises(AssertionError, match="value is off"):
        check("wrong", [wrong], [x], [exact], 8)
    with pytest.raises(AssertionError, match="gradient 1 is off"):
        check("wrong", [x, wrong], [x, x], [exact, exact], 8)


def test_nan_is_wrong() -> None:
    x = torch.randn(10)
    with pytest.raises(AssertionError, match="nan"):
        check("nan", [x * float("nan")], [x], [x.double()], 8)


@pytest.mark.parametrize("iterations", [0, 1, 2, 3])
@pytest.mark.parametrize("name", list(peers.ROUTING))
@pytest.mark.parametrize("passes", BOTH)
def test_every_peer_computes_the_layer(passes: str, name: str, iterations: int) -> None:
    case = RoutingCase(5, 7, 3, 4, 6, iterations=iterations)
    found = run(bound(peers.ROUTING[name], case), passes, *case.inputs())
    check(name, found, plain(case, passes), exact(case, passes), 42)


def test_every_peer_adds_the_bias() -> None:
    (u, weight), _ = SMALL.inputs()
    bias = torch.randn(3, 4)
    found = [form(u, weight, bias, 3) for form in peers.ROUTING.values()]
    for v in found:
        torch.testing.assert_close(v, cases.reference.capsule_routing(u, weight, bias))


@pytest.mark.parametrize("name", list(peers.DYNAMIC_ROUTING))
def test_routing_of_given_predictions(name: str) -> None:
    u_hat = torch.randn(5, 7, 3, 4)
    expected = cases.reference.dynamic_routing(u_hat)
    torch.testing.assert_close(peers.DYNAMIC_ROUTING[name](u_hat, None, 3), expected)


def test_the_reference_in_slices_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = exact(SMALL, FORWARD_BACKWARD)
    exact.cache_clear()
    monkeypatch.setattr(cases, "_SLICE", 2 * SMALL.predictions // SMALL.batch)
    sliced = exact(SMALL, FORWARD_BACKWARD)
    exact.cache_clear()
    for x, y in zip(whole, sliced, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("wrong", ["ours", "peer"])
def test_what_computes_something_else_is_not_timed(wrong: str) -> None:
    def timed(*calls: object) -> Race:
        pytest.fail("a wrong result was timed")

    right = bound(cases.reference.capsule_routing, SMALL)
    form = {
        name: (lambda u, weight: 1.01 * right(u, weight)) if name == wrong else right
        for name in ("ours", "peer")
    }
    row = Row("routing", "capsule_routing", str(SMALL), FORWARD_BACKWARD)
    truth = plain(SMALL, FORWARD_BACKWARD), exact(SMALL, FORWARD_BACKWARD)
    with pytest.raises(AssertionError, match="value is off"):
        measure(row, form["ours"], {"peer": form["peer"]}, *SMALL.inputs(), *truth, 42, timed)
