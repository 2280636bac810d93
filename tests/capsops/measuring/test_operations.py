"""Operation counts by hand."""

from capsops.measuring.cases import Case
from capsops.measuring.operations import operations
from capsops.measuring.passes import FORWARD, FORWARD_BACKWARD


def test_one_number_of_everything() -> None:
    """B = I = J = D = K = 1: a product is 2 operations, as is a dot product with û."""
    three, one = Case(1, 1, 1, 1, 1, iterations=3), Case(1, 1, 1, 1, 1, iterations=1)
    assert operations(one, FORWARD).flops == 2
    assert operations(three, FORWARD).flops == 2 + 2 * (2 + 4)
    # û, one term of ∂û, ∂u and ∂W
    assert operations(one, FORWARD_BACKWARD).flops == 2 + (2 + 2 + 2 + 2)
    assert operations(three, FORWARD_BACKWARD).flops == 14 + 2 * (2 + 6) + (2 + 2 * 8 + 2 + 4)


def test_no_routing_is_one_pass() -> None:
    none, one = Case(4, iterations=0), Case(4, iterations=1)
    assert operations(none, FORWARD).flops == operations(one, FORWARD).flops


def test_the_paper() -> None:
    assert (
        operations(Case(128), FORWARD).flops == 3 * 128 * 1152 * 10 * 16 * 16 + 2 * 128 * 1152 * 10 * 16 * 4
    )
