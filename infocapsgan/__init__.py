"""Capsule GANs, InfoGAN and capsule classifiers on capsops: each a published system, trained by one loop.

run = infocapsgan.train("infogan", dataset="mnist", max_steps=500)
run = infocapsgan.load("runs/0001-infogan-mnist")
run.predict("digit.png").names, run.sample(10, label=3), run.reconstruct(images), run.capsules(images)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infocapsgan.engine.loaded_run import load
    from infocapsgan.engine.training import train

__all__ = ["load", "train"]


def __getattr__(name: str) -> Any:
    # Not imported at once: `python -m infocapsgan.train` imports this module first.
    if name == "load":
        from infocapsgan.engine.loaded_run import load

        return load
    if name == "train":
        from infocapsgan.engine.loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
