"""What every system can be told, and the checks that come before any work."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from infocapsgan import data

Dataset = Literal[data.SINGLE_NAMES]
Recipe = Literal["tuned", "published"]


class Range(NamedTuple):
    """The values that an option takes: low … high, both included."""

    low: float
    high: float = float("inf")

    def __str__(self) -> str:
        return f"at least {self.low:g}" if self.high == float("inf") else f"{self.low:g} to {self.high:g}"


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
    image_size: int | None = None
    """Height and width of the images of --dataset folder [32]: a multiple of 4 from 28 to 128."""
    out: Path | None = None
    """The run directory [a new numbered one under runs/]."""
    epochs: Count = 30
    """Passes over the training images."""
    max_steps: Count | None = None
    """Total number of steps, where training should end before its epochs do."""
    batch_size: Count = 128
    """Images per step, over all processes."""
    seed: Whole = 0
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
    """Run directory to continue; beside it --epochs (alone it lifts the run's --max-steps), --max-steps."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            _check(option_name(name), getattr(self, name), hint)
        if self.width % 8:
            raise ValueError(f"--width: got {self.width}, takes a multiple of 8")

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON holds them: paths become strings."""
        values = dataclasses.asdict(self)
        del values["resume"]
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Settings":
        """What to_json gave, read again."""
        paths = {name: Path(values[name]) for name in ("data_dir", "out") if values[name] is not None}
        return cls(**(values | paths))


def option_name(field: str) -> str:
    """batch_size → --batch-size."""
    return "--" + field.replace("_", "-")


def _check(option: str, value: Any, hint: Any) -> None:
    for choice in (hint, *getattr(hint, "__args__", ())):
        for limit in getattr(choice, "__metadata__", ()):
            if isinstance(limit, Range) and value is not None and not limit.low <= value <= limit.high:
                raise ValueError(f"{option}: got {value}, takes {limit}")
    literals = getattr(hint, "__args__", ()) if getattr(hint, "__origin__", None) is Literal else ()
    if literals and value not in literals:
        raise ValueError(f"{option}: got {value!r}, takes one of {', '.join(map(str, literals))}")
