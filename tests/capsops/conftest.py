"""A test that takes `impl` runs once for every implementation that could serve CPU tensors."""

import pytest

from capsops import dispatch


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "impl" not in metafunc.fixturenames:
        return
    rows = [row for row in dispatch.describe() if row.device == "cpu"]
    metafunc.parametrize(
        "impl",
        [
            pytest.param(
                row.impl,
                marks=pytest.mark.skipif(not row.available, reason=f"impl={row.impl!r}: {row.reason}"),
            )
            for row in rows
        ],
    )
