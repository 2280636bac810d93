"""A test that takes `impl` runs once for every backend that takes CPU tensors."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

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


def _forget() -> None:
    dispatch.proofs.cache_clear()
    dispatch._automatic.cache_clear()


@pytest.fixture
def change_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Replaces fields of a backend's record, and functions by the names of their ops, until the test ends."""

    def change(name: str, **changes: Any) -> None:
        backend = dispatch.BACKENDS[name]
        functions = {op: changes.pop(op, function) for op, function in backend.functions.items()}
        monkeypatch.setitem(dispatch.BACKENDS, name, replace(backend, **{"functions": functions, **changes}))
        _forget()

    _forget()
    yield change
    monkeypatch.undo()
    _forget()
