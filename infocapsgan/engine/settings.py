"""What every system can be told, and the checks that come before any work."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from infocapsgan import data

Dataset = Literal[data.SINGLE_NAMES]  # type: ignore[valid-type]
Recipe = Literal["tuned", "published"]


class Range(NamedTuple):
    """The values that an option takes: low … high, both included."""

    low: float
    high: float = float("inf")

    def __str__(self) -> str:
        return f"at least {self.low:g}" if self.high == float("inf") else f"{self.low:g} to {self.high:g}"


_IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path", str: "a text"}

Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Weight = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options that all systems have."""

    recipe: Recipe = "tuned"
    """tuned: what works best; published: as published. Sets the defaults of the other options."""
    dataset: Dataset = "digits"
    """Images to train on. digits comes with scikit-learn and needs no download."""
    data_dir: Path | None = None
    """Folder that holds mnist/ and its like [$INFOCAPSGAN_DATA, then the user's cache folder]."""
    image_size: Annotated[int, Range(28, 128)] | None = None
    """Height and width of the images of --dataset folder [32]: a multiple of 4 from 28 to 128."""
    out: Path | None = None
    """The run directory [a new numbered one under runs/]."""
    epochs: Count | None = 30
    """Passes over the training images [of a folder: the recipe's, and at least 1,500 steps]."""
    max_steps: Count | None = None
    """Total number of steps, where training should end before its epochs do."""
    batch_size: Count | None = 128
    """Images per step, over all processes [of a folder: the recipe's, or about a tenth of its images]."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """Of the weights, the order of the images and every other random number."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU where there is one."""
    impl: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    """Which implementation of the capsule kernels to use; auto leaves it to CAPSOPS_IMPL, then to capsops."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the forward passes; bf16 and fp16 by autocast, fp16 with gradient scaling."""
    width: Annotated[int, Range(8)] = 256
    """Channels of the convolutions, a multiple of 8: a primary capsule has 8."""
    compile: bool = False
    """Whether torch.compile compiles the networks; capsule kernels stay as they are."""
    log_every: Count = 10
    """Steps between rows of losses in metrics.jsonl and TensorBoard."""
    evaluate_every: Count | None = None
    """Steps between evaluations, with pictures [once an epoch, but 100 steps apart or more]."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints [as --evaluate-every]."""
    resume: Path | None = None
    """Run directory to continue; beside it only --epochs (it lifts --max-steps), --max-steps, --data-dir."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            if isinstance(value, str | Path) and Path in get_args(hint):
                # That of the data absolute: a run can be continued from another working directory.
                value = Path(value).absolute() if name == "data_dir" else Path(value)
                object.__setattr__(self, name, value)
            if wanted := mismatch(value, hint):
                raise ValueError(f"{option_name(name)}: got {value!r:.100}, takes {wanted}")
        if self.width % 8:
            raise ValueError(f"--width: got {self.width}, takes a multiple of 8")
        if self.image_size and self.dataset != "folder":
            raise ValueError(f"--image-size: got {self.image_size}, goes with --dataset folder only")
        if (self.image_size or 0) % 4:
            raise ValueError(f"--image-size: got {self.image_size}, takes a multiple of 4 from 28 to 128")
        if self.dataset != "folder" and None in (self.batch_size, self.epochs):
            raise ValueError("--batch-size, --epochs: take a number, but for --dataset folder")

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON holds them: all but --resume, and paths as strings."""
        values = dataclasses.asdict(self)
        del values["resume"]
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Settings":
        """What to_json gave, read again; ValueError where an option is missing, unknown or out of range."""
        known = {field.name for field in dataclasses.fields(cls)} - {"resume"}
        for what, names in (("is missing", known - values.keys()), ("is unknown", values.keys() - known)):
            if names:
                raise ValueError(f"{option_name(min(names))} {what}")
        return cls(**values)


def option_name(field: str) -> str:
    """batch_size → --batch-size."""
    return "--" + field.replace("_", "-")


def mismatch(value: Any, hint: Any) -> str:
    """What a type with its range takes, in words, where `value` is none of it; otherwise empty."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        reasons = [mismatch(value, part) for part in parts if part is not NoneType]
        return "" if "" in reasons or (value is None and NoneType in parts) else " or ".join(reasons)
    if kind is Literal:
        return "" if isinstance(value, str) and value in parts else f"one of {', '.join(parts)}"
    if kind is Annotated:
        wrong = mismatch(value, parts[0])
        limits = [limit for limit in parts[1:] if isinstance(limit, Range)]
        out = [str(limit) for limit in limits if wrong or not limit.low <= value <= limit.high]
        return ", ".join(filter(None, [wrong, *out]))
    if kind in (dict, list):
        inner = value.values() if isinstance(value, dict) else value
        fits = isinstance(value, kind) and not any(mismatch(part, parts[-1]) for part in inner)
        return "" if fits else f"a {kind.__name__}"
    fits = hint is Any or isinstance(value, (int, float) if hint is float else hint)
    if hint in (int, float):
        fits = fits and not isinstance(value, bool) and (hint is int or abs(value) <= sys.float_info.max)
    return "" if fits else _IN_WORDS[hint]
