"""The pictures that training left, one after another."""

import re
from pathlib import Path

from PIL import Image, ImageOps

from infocapsgan.engine.loaded_run import LoadedRun
from infocapsgan.systems import NotApplicableError


def animate(run: LoadedRun, *, pictures: str | None = None) -> list[Image.Image]:
    """The pictures in samples/ one after another, each with its step.

    Args:
        pictures: which of those in samples/ [samples, or the first].
    """
    kept = kept_pictures(run.path)
    if not kept:
        raise NotApplicableError(f"animate: {run.path}/samples holds no pictures")
    name = pictures or ("samples" if "samples" in kept else next(iter(kept)))
    if name not in kept:
        raise NotApplicableError(f"--pictures: got {name}, takes one of {', '.join(kept)}")
    frames = [Image.open(path).convert("RGB") for path in kept[name]]
    width, height = (max(sizes) for sizes in zip(*(frame.size for frame in frames), strict=True))
    # Frames differ by a few pixels where their labels do: the right and lower edges stay in place.
    margins = [(width - frame.width, height - frame.height, 0, 0) for frame in frames]
    return [ImageOps.expand(frame, margin, "white") for frame, margin in zip(frames, margins, strict=True)]


def kept_pictures(run: Path) -> dict[str, list[Path]]:
    """The pictures in samples/ by name, in the order of their steps."""
    kept: dict[str, list[Path]] = {}
    for path in sorted((run / "samples").glob("*.png")):
        if matched := re.fullmatch(r"(.+)-(\d{8,})", path.stem):
            kept.setdefault(matched[1], []).append(path)
    return kept
