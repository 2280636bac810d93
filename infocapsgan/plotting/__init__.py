"""Pictures of a trained system: each kind is a module here, and the function in it of the same name.

The function turns a loaded run, and options of its own, into a figure or the frames of a GIF;
`python -m infocapsgan.visualize` takes its help from the function's docstring.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

KINDS: dict[str, Callable[..., Any]] = {}


def import_kinds() -> None:
    """Fills KINDS: not at the import of this package, which systems need for their sheets."""
    for module in pkgutil.iter_modules(__path__):
        if kind := getattr(importlib.import_module(f"{__name__}.{module.name}"), module.name, None):
            KINDS[module.name] = kind
