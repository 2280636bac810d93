"""The floor of a kernel."""

import pytest

from capsops.measuring.cases import Case
from capsops.measuring.floor import floor_seconds
from capsops.measuring.passes import FORWARD, FORWARD_BACKWARD

TF32 = "float32, TF32 allowed"
CEILINGS = {"bandwidth": 4e12, "bfloat16": 8e14, TF32: 4e14, "float32": 5e13, "exponentials": 4e12}


def test_floor_counts_every_unit() -> None:
    case, exact = Case(128, precision=TF32), Case(128)
    seconds, unit = floor_seconds(case, FORWARD, CEILINGS)
    pairs = 128 * 1152 * 10
    assert unit == "sums"
    assert seconds == pytest.approx(2 * 2 * 2 * pairs * 16 / 5e13)
    seconds, unit = floor_seconds(exact, FORWARD, CEILINGS)
    assert seconds == pytest.approx((4 * 2 + 3 * 2 * 8) * pairs * 16 / 5e13)
    both, _ = floor_seconds(case, FORWARD_BACKWARD, CEILINGS)
    assert both == pytest.approx((4 + 6 + 8 + 1) * 2 * pairs * 16 / 5e13)
    slow = CEILINGS | {"bandwidth": 1e9}
    seconds, unit = floor_seconds(case, FORWARD, slow)
    assert unit == "bytes"
    assert seconds == pytest.approx(4 * (128 * 1152 * 8 + 1152 * 10 * 16 * 8 + 128 * 10 * 16) / 1e9)
    assert floor_seconds(case, FORWARD, CEILINGS | {"exponentials": 1e9})[1] == "exponentials"
