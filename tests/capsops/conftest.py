"""A test that takes `impl` runs once for every implementation that could serve CPU tensors."""

from collections.abc import Iterator

import pytest
import torch

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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are small: waiting for a second thread costs more than it gives. See test_threads.py."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
