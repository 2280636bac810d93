"""Pictures of a trained system: each kind is a module here, and the function in it of the same name.

The function turns a loaded run, and options of its own, into a figure or the frames of a GIF;
`python -m infocapsgan.visualize` takes its help from the function's docstring.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any


def kinds() -> dict[str, Callable[..., Any]]:
    """All kinds by name; imported only now, as systems need this package for their sheets."""
    modules = {
        name: importlib.import_module(f"{__name__}.{name}") for _, name, _ in pkgutil.iter_modules(__path__)
    }
    return {name: getattr(module, name) for name, module in modules.items() if hasattr(module, name)}
