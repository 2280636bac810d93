"""Pictures of a trained system: a module for each kind, which registers itself.

A kind is a function from a loaded run, and options of its own, to a figure, or to the frames of a GIF.
`python -m infocapsgan.visualize` takes its help from the function's docstring.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

KINDS: dict[str, Callable[..., Any]] = {}


def register(kind: Callable[..., Any]) -> Callable[..., Any]:
    """Registers a kind of picture under the name of its function."""
    return KINDS.setdefault(kind.__name__, kind)


def import_kinds() -> None:
    """Imports every module here, so that the kinds in it register themselves."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
