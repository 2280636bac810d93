"""Under Triton's interpreter every call of a function within a kernel looks for what is to be replaced in
Triton's language, among all of its names: half of the time. They are the same names each time."""

import inspect
import os
from collections.abc import Iterator
from functools import cache
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture(scope="session", autouse=True)
def names_of_the_language() -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    @cache
    def builtins(package: ModuleType | type) -> list[str]:
        return [name for name, x in inspect.getmembers(package) if interpreter.tl.core.is_builtin(x)]

    def getmembers(package: ModuleType | type) -> list[tuple[str, object]]:
        return [(name, getattr(package, name)) for name in builtins(package)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "inspect", SimpleNamespace(**{**vars(inspect), "getmembers": getmembers}))
        yield
