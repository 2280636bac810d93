"""A wrong result is rejected."""

import pytest
import torch

from benchmarks.measure import measure
from capsops.measuring import cases, peers
from capsops.measuring.cases import Case, exact, plain
from capsops.measuring.comparison import check, relative_error
from capsops.measuring.passes import BOTH, FORWARD_BACKWARD, run
from capsops.measuring.timing import Race

SMALL = Case(5, 7, 3, 4, 6)


def test_one_wrong_element_is_noticed() -> None:
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
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, forms in peers.FORMS.items() for name in forms])
@pytest.mark.parametrize("passes", BOTH)
def test_every_peer_computes_the_op(passes: str, op: str, name: str, iterations: int) -> None:
    case = Case(5, 7, 3, 4, 6, iterations=iterations, op=op)
    results = run(case.bind(peers.FORMS[op][name]), passes, *case.inputs())
    check(name, results, plain(case, passes), exact(case, passes), 42)


def test_every_peer_adds_the_bias() -> None:
    (u, weight), _ = SMALL.inputs()
    bias = torch.randn(3, 4)
    for form in peers.FORMS["capsule_routing"].values():
        v = form(u, weight, bias, 3)
        torch.testing.assert_close(v, cases.reference.capsule_routing(u, weight, bias))


def test_the_reference_in_slices_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = exact(SMALL, FORWARD_BACKWARD)
    exact.cache_clear()
    monkeypatch.setattr(cases, "_SLICE", 2 * SMALL.predictions // SMALL.batch)
    sliced = exact(SMALL, FORWARD_BACKWARD)
    exact.cache_clear()
    for x, y in zip(whole, sliced, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("wrong", ["ours", "peer"])
def test_a_wrong_result_is_not_timed(wrong: str) -> None:
    def timed(*calls: object) -> Race:
        pytest.fail("a wrong result was timed")

    right = cases.reference.capsule_routing
    forms = {
        name: (lambda *x, **options: 1.01 * right(*x, **options)) if name == wrong else right
        for name in ("ours", "peer")
    }
    with pytest.raises(AssertionError, match=f"{wrong}: value is off"):
        measure("routing", SMALL, FORWARD_BACKWARD, forms, timed)


def test_an_exact_result_of_zeros() -> None:
    """As the gradient of logits with one output capsule: its error is not divided by its norm."""
    zeros = torch.zeros(3)
    assert relative_error(zeros, zeros) == 0
    assert relative_error(zeros + 0.5, zeros) == pytest.approx(0.5 * 3**0.5)
    assert check("name", [zeros], [zeros], [zeros], 100) == 0
    with pytest.raises(AssertionError, match="value is off by"):
        check("name", [zeros + 1e-3], [zeros], [zeros], 100)
