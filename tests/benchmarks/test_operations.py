"""Operation counts by hand."""

from benchmarks.cases import RoutingCase
from benchmarks.operations import routing_operations
from benchmarks.passes import FORWARD, FORWARD_BACKWARD


def test_one_number_of_everything() -> None:
    """B = I = J = D = K = 1: a product is 2 operations, as is a dot product with û."""
    three, one = RoutingCase(1, 1, 1, 1, 1, iterations=3), RoutingCase(1, 1, 1, 1, 1, iterations=1)
    assert routing_operations(one, FORWARD) == 2
    assert routing_operations(three, FORWARD) == 2 + 2 * (2 + 4)
    # û, one term of ∂û, ∂u and ∂W
    assert routing_operations(one, FORWARD_BACKWARD) == 2 + (2 + 2 + 2 + 2)
    assert routing_operations(three, FORWARD_BACKWARD) == 14 + 2 * (2 + 6) + (2 + 2 * 8 + 2 + 4)


def test_no_routing_is_one_pass() -> None:
    none, one = RoutingCase(4, iterations=0), RoutingCase(4, iterations=1)
    assert routing_operations(none, FORWARD) == routing_operations(one, FORWARD)


def test_the_paper() -> None:
    assert (
        routing_operations(RoutingCase(128), FORWARD)
        == 3 * 128 * 1152 * 10 * 16 * 16 + 2 * 128 * 1152 * 10 * 16 * 4
    )
