"""Fixtures that spare Triton's interpreter repeated work, which would take half of the time."""

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session", autouse=True)
def language_is_replaced_once() -> Iterator[None]:
    """Makes the interpreter replace parts of Triton's language once per module with functions of a kernel.

    By itself it replaces them at every call of a function within a kernel.
    """
    interpreter = INTERPRETED and pytest.importorskip("triton.runtime.interpreter")
    if not hasattr(interpreter, "_LangPatchScope"):
        yield
        return
    replace, replaced = interpreter._patch_lang, set()

    def restore(scope: Any) -> None:
        replaced.clear()
        scope.restore()

    def replace_once(function: Callable) -> object:
        # What is replaced depends only on the names under which the function's module imports the language.
        if function.__module__ in replaced:
            return None
        replaced.add(function.__module__)
        scope = replace(function)
        return SimpleNamespace(restore=lambda: restore(scope))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def types_are_made_once() -> Iterator[None]:
    """Caches block types and NumPy's types, which the interpreter would make again in every operation."""
    interpreter = INTERPRETED and pytest.importorskip("triton.runtime.interpreter")
    if not hasattr(interpreter, "_get_np_dtype"):
        yield
        return
    from triton.language import block_type

    of_numpy, numpy_types = interpreter._get_np_dtype, {}
    describe, described = block_type.__init__, {}

    def of_numpy_once(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in numpy_types:
            numpy_types[name] = of_numpy(dtype)
        return numpy_types[name]

    def describe_once(self: Any, element: Any, shape: Any) -> None:
        key = (element.name, tuple(shape))
        if key not in described:
            describe(self, element, shape)
            described[key] = dict(vars(self))
        vars(self).update(described[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_get_np_dtype", of_numpy_once)
        patch.setattr(block_type, "__init__", describe_once)
        yield
