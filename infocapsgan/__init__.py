"""Capsule GANs, InfoGAN and capsule classifiers on capsops: each a published system, trained by one loop.

run = infocapsgan.train("infogan", dataset="mnist", max_steps=500)
run = infocapsgan.load("runs/0001-infogan-mnist")
run.predict("digit.png").names, run.sample(10, label=3), run.reconstruct(images), run.capsules(images)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infocapsgan.engine.loaded_run import load
    from infocapsgan.train import train

__all__ = ["load", "train"]


def __getattr__(name: str) -> Any:
    # Only when it is asked for: `python -m infocapsgan.train` imports this package first.
    if name == "load":
        return importlib.import_module("infocapsgan.engine.loaded_run").load
    if name == "train":
        return importlib.import_module("infocapsgan.train")  # which can be called
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
