"""A run directory, loaded: the trained system, ready to be used, measured and plotted."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from infocapsgan.data import Dataset, ImageShape
from infocapsgan.data.dataset import in_batches
from infocapsgan.data.images import to_images
from infocapsgan.engine import checkpoint
from infocapsgan.engine.device import local_device
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.run_directory import RunError, read_config
from infocapsgan.engine.settings import Settings
from infocapsgan.models.capsule_encoder import Capsules
from infocapsgan.systems import SYSTEMS, NotApplicableError, System


class Weights(NamedTuple):
    """The checkpoint of a run that has the weights to use, and its step."""

    checkpoint: Path
    step: int


@dataclass(frozen=True)
class Predictions:
    """What a system predicts for images.

    Attributes:
        names: the predicted class of each image, by name [N].
        labels: its number in `class_names`, as int64 [N]; [N, 2] of a system trained on pairs of digits.
        probabilities: of each class [N, J]. Of capsule classifiers these are lengths of capsules, each from 0
            to 1, which do not add up to 1.
        class_names: what each column of `probabilities` stands for.
    """

    names: list[str]
    labels: Tensor
    probabilities: Tensor
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class LoadedRun:
    """A trained system in evaluation mode.

    Images are tensors or arrays (uint8, or float in [0, 1]), PIL images, paths, or a sequence of these; they
    are resized and brought to the system's channels as images of --dataset folder are (data/images.py). What
    comes back is on the system's device.

    Attributes:
        path: the run directory.
        name: of the system.
        system: with the weights of the last checkpoint, or of the best of a run with --validation.
        weights: where these are from.
        device: where they are.
    """

    path: Path
    name: str
    system: System = field(repr=False)
    weights: Weights
    device: torch.device

    @torch.no_grad()
    def predict(self, images: Any) -> Predictions:
        """The class of each image, and the probability of each class.

        A system that learned without labels predicts class codes; each has the name of the class that it was
        matched with on the labelled training images, if it was. NotApplicableError if it does neither.
        """
        system, pixels = self.system, self._images(images)
        system.require("classify", "predict", "cluster")
        if system.label_of_code is None:
            probabilities, names = in_batches(system.classify, pixels), self.class_names
        else:
            probabilities, codes = in_batches(system.code_probabilities, pixels), system.label_of_code
            matched = enumerate(codes.tolist())
            names = tuple(self.class_names[j] if j >= 0 else f"code {code}" for code, j in matched)
            if sorted(names) == sorted(self.class_names):
                # A one-to-one map: column j becomes that of the code which was matched with label j.
                probabilities, names = probabilities[:, codes.argsort()], self.class_names
        labels = probabilities.argmax(dim=1)
        if system.settings.dataset == "multi-mnist":
            labels = probabilities.topk(2, dim=1).indices.sort(dim=1).values
        words = ["+".join(names[j] for j in row) for row in labels.view(len(labels), -1).tolist()]
        return Predictions(words, labels, probabilities, names)

    @torch.no_grad()
    def sample(
        self,
        number: int = 1,
        *,
        label: int | str | None = None,
        code: int | None = None,
        codes: Sequence[float] | Tensor | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Generated images [number, C, H, W] in [0, 1].

        Args:
            number: of images.
            label: a class, by number or name: the class code that was matched with it is used.
            code: the class code itself; without either it is random.
            codes: the continuous codes, in training from −1 to 1: one value each, or [number, codes].
            seed: of the noise and of the codes that are not set.

        Raises:
            NotApplicableError: the system does not generate images from noise, or has no such code.
            ValueError: a value is out of range, or no code was matched with the label.
        """
        system = self.system
        system.require("latents", "sample")
        if number < 1:
            raise ValueError(f"number: got {number}, takes at least 1")
        chosen: dict[str, Tensor] = {}
        if label is not None or code is not None:
            chosen["code"] = torch.full((number,), self._code(label, code), device=self.device)
        if codes is not None:
            if not system.continuous_codes:
                raise NotApplicableError(f"codes: this {self.name} has no continuous codes")
            values = torch.as_tensor(codes, dtype=torch.float32, device=self.device)
            shapes = [[system.continuous_codes], [number, system.continuous_codes]]
            if (shape := list(values.shape)) not in shapes or not values.isfinite().all():
                takes = f"{shapes[0]} or {shapes[1]} of finite numbers"
                raise ValueError(f"codes: got shape {shape}, takes {takes}")
            chosen["continuous"] = values.expand(number, -1)
        rng = ShardedGenerator(seed, self.device)
        return in_batches(system.generate, system.random_latents(number, rng, **chosen))

    @torch.no_grad()
    def reconstruct(self, images: Any) -> Tensor:
        """Reconstructed images [N, C, H, W] in [0, 1]; NotApplicableError if the system makes none."""
        self.system.require("reconstruct", "reconstruct")
        return in_batches(self.system.reconstruct, self._images(images))

    @torch.no_grad()
    def capsules(self, images: Any) -> Capsules:
        """Primary capsules [N, I, K] and class capsules [N, J, D]; NotApplicableError if it has none."""
        self.system.require("capsules", "capsules")
        parts = map(self.system.capsules, self._images(images).split(500))
        return Capsules(*map(torch.cat, zip(*parts, strict=True)))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each label, as it was when the run was trained."""
        return self.system.class_names

    @property
    def title(self) -> str:
        """What was trained, and how far its training had come: for the title of a picture."""
        s, best = self.system.settings, self.weights.checkpoint.name == checkpoint.BEST
        step = f"{'best weights, ' if best else ''}step {self.weights.step:,}"
        return f"{self.name} on {s.dataset} (recipe {s.recipe}, seed {s.seed}), {step}"

    def warn(self) -> None:
        """Says on standard error which part is not trained yet."""
        if untrained := self.system.untrained(self.weights.step):
            print(f"warning: {untrained}", file=sys.stderr)

    @cached_property
    def dataset(self) -> Dataset:
        """The data that the system was trained on, cropped to the middle, on its device."""
        return self.system.load_data().to(self.device).centred()

    def _images(self, images: Any) -> Tensor:
        return to_images(images, self.system.image_shape).to(self.device)

    def _code(self, label: int | str | None, code: int | None) -> int:
        codes, labels = self.system.codes, self.system.label_of_code
        if not codes:
            raise NotApplicableError(f"label, code: this {self.name} has no class code")
        if label is not None and code is not None:
            raise ValueError(f"label and code exclude one another, got both ({label!r} and {code})")
        if code is not None:
            if code not in range(codes):
                raise ValueError(f"code: got {code}, takes 0 to {codes - 1}")
            return int(code)
        matched = [] if labels is None else labels.tolist()
        names = [self.class_names[j] for j in sorted(matched) if j >= 0]
        number = self.class_names.index(label) if isinstance(label, str) and label in names else label
        if number not in matched or number == -1:
            takes = f"one of {', '.join(names)}" if names else "none: its codes were matched with no labels"
            raise ValueError(f"label: got {label!r}, takes {takes}")
        return matched.index(number)


def load(path: str | Path, *, device: str = "auto", data_dir: str | Path | None = None) -> LoadedRun:
    """Reads a run directory; the training data are not needed.

    Args:
        path: of the run directory.
        device: auto, cpu or cuda; auto takes a GPU where there is one.
        data_dir: where the training data are now, if they were moved: for `dataset`, `evaluate`, `visualize`.

    Raises:
        RunError: there is no run, it has no checkpoint that can be read, another version of the package wrote
            it, or there is no such device.
    """
    path = Path(path)
    config, (name, settings) = read_config(path), read_settings(path)
    settings = replace(settings, data_dir=Path(data_dir)) if data_dir else settings
    system = SYSTEMS[name](settings, image_shape=ImageShape(**config.image_shape))
    system.class_names, weights = tuple(config.class_names), _weights(path / "checkpoints")
    try:
        system.load_state_dict(load_file(weights.checkpoint / checkpoint.WEIGHTS))
    except RuntimeError as error:
        raise RunError(f"the weights in {weights.checkpoint} do not fit this system: {error}") from error
    system = system.to(local_device(device)).eval().requires_grad_(False)
    return LoadedRun(path, name, system, weights, system.device)


def read_settings(path: Path) -> tuple[str, Settings]:
    """The name of the system of the run in `path`, and its settings."""
    name, values, *_ = read_config(path)
    if name not in SYSTEMS:
        raise RunError(f"{path} holds a run of {name!r}, which is none of {', '.join(SYSTEMS)}")
    try:
        return name, SYSTEMS[name].Settings.from_json(values)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{path} was changed, or written by another version of infocapsgan: {error}"
        ) from error


def _weights(folder: Path) -> Weights:
    if best := checkpoint.read_best(folder):
        return Weights(folder / checkpoint.BEST, best["step"])
    if newest := checkpoint.load_newest(folder):
        return Weights(newest[1], newest[0].numbers["step"])
    raise RunError(f"{folder.parent} has no checkpoint yet; train on with --resume {folder.parent}")
