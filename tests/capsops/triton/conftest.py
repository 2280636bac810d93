"""Under Triton's interpreter every call of a function within a kernel replaces parts of Triton's language
anew, which is two fifths of the time. Once for each module that has a function of the kernel is enough.
"""

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def language_is_replaced_once() -> Iterator[None]:
    interpreter = os.environ.get("TRITON_INTERPRET") == "1" and pytest.importorskip(
        "triton.runtime.interpreter"
    )
    if not hasattr(interpreter, "_LangPatchScope"):
        yield
        return
    replace, replaced = interpreter._patch_lang, set()

    def restore(scope: Any) -> None:
        replaced.clear()
        scope.restore()

    def replace_once(function: Callable) -> object:
        # What is replaced follows from the names that the function's module has for the language.
        if function.__module__ in replaced:
            return None
        replaced.add(function.__module__)
        scope = replace(function)
        return SimpleNamespace(restore=lambda: restore(scope))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        yield
