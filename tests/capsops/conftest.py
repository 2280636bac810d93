"""Runs a test with an argument `impl` once for every backend that supports CPU tensors; shared fixtures."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from capsops import dispatch
from capsops.proofs import order


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


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty returns NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def _clear_caches() -> None:
    dispatch._standings = dispatch._Standings()
    dispatch._automatic.cache_clear()
    order.record_file.cache_clear()


@pytest.fixture
def change_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function that replaces fields of a backend's record, or functions by op, until the test ends."""

    def change(name: str, **changes: Any) -> None:
        backend = dispatch.BACKENDS[name]
        functions = {op: changes.pop(op, function) for op, function in backend.functions.items()}
        monkeypatch.setitem(dispatch.BACKENDS, name, replace(backend, **{"functions": functions, **changes}))
        _clear_caches()

    _clear_caches()
    yield change
    monkeypatch.undo()
    _clear_caches()
