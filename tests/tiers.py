"""Which cases of a parametrised test are left to the slow tier."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case for the slow tier."""
    return pytest.param(*values, marks=pytest.mark.slow)


def fast_only(fast: Collection, cases: Iterable) -> list[Any]:
    """All cases, marked as slow unless they are in `fast`; a tuple has a value for each argument."""
    return [case if case in fast else slow(*(case if isinstance(case, tuple) else [case])) for case in cases]
