"""What the training loop knows of a system."""

import dataclasses
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from infocapsgan import data
from infocapsgan.data import Dataset, ImageShape, image_shape
from infocapsgan.engine.settings import Settings
from infocapsgan.engine.train_state import TrainState


class System(nn.Module):
    """Networks, optimisers, one training step, and what is measured and drawn.

    An ordinary module: `InfoCapsGAN(dataset="mnist").generator` works in anybody's loop.

    Args:
        settings: what defaults() gives, or what a run was started with.
        options: instead of settings, those that differ from the defaults.
    """

    Settings: ClassVar[type[Settings]]
    recipes: ClassVar[dict[str, dict[str, Any]]]
    """For each recipe, the options whose defaults differ from those of `Settings`."""
    datasets: ClassVar[dict[str, dict[str, Any]]] = {}
    """For a data set, the options whose defaults differ."""
    tuned: ClassVar[dict[str, dict[str, Any]]] = {}
    """For a data set, those that differ under the recipe tuned alone."""
    headline: ClassVar[str]
    """The metric that the progress bar and the last line of a run show."""

    settings: Settings
    optimizers: dict[str, Optimizer]

    def __init__(self, settings: Settings | None = None, **options: Any) -> None:
        super().__init__()
        if settings is None:
            chosen = {name: options[name] for name in ("recipe", "dataset") if name in options}
            settings = dataclasses.replace(self.defaults(**chosen), **options)
        elif options:
            raise ValueError(
                f"settings and options exclude one another, got both (options: {', '.join(options)})"
            )
        self.settings = settings
        self.optimizers = {}

    @classmethod
    def defaults(cls, recipe: str = "tuned", dataset: str = "digits") -> Settings:
        """The settings of a recipe on a data set."""
        settings = cls.Settings(recipe=recipe, dataset=dataset)  # checks both
        options = cls.datasets.get(dataset, {}) | cls.recipes[recipe]
        options |= cls.tuned.get(dataset, {}) if recipe == "tuned" else {}
        if dataset == "folder":  # the number of its images chooses, see engine/start.py
            options |= {"batch_size": None, "epochs": None}
        return dataclasses.replace(settings, **options)

    @cached_property
    def image_shape(self) -> ImageShape:
        """Channels, size and classes of the images; a folder is looked through once."""
        return image_shape(self.settings.dataset, self.settings.data_dir)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def networks(self) -> list[nn.Module]:
        """The modules that a step calls, which is what --compile compiles."""
        return list(self.children())

    def compile_networks(self, backend: str = "inductor") -> None:
        """Has torch.compile compile each network; names of weights stay as they are."""
        for network in self.networks:
            network.compile(backend=backend, dynamic=False)

    def load_data(self) -> Dataset:
        """The data set that the settings name."""
        return data.load(self.settings.dataset, self.settings.data_dir)

    def step(self, images: Tensor, labels: Tensor, state: TrainState) -> dict[str, Tensor]:
        """One training step on images [B, C, H, W] as uint8 and labels [B]; returns named losses."""
        raise NotImplementedError

    def evaluate(self, dataset: Dataset) -> dict[str, float]:
        """Metrics on the whole of `dataset`; no random number of the training is used."""
        raise NotImplementedError

    def fidelity(self, dataset: Dataset) -> dict[str, float]:
        """How near generated images come to those of `dataset`, where the settings ask for it."""
        return {}

    @property
    def validation_share(self) -> float:
        """The share of the training images that is held out to choose weights by; 0: none."""
        return 0.0

    def validation_loss(self, held_out: Dataset) -> float:
        """What the kept weights have the lowest of, on the test images of `held_out`."""
        raise NotImplementedError

    def untrained(self, steps: int) -> str:
        """What is not trained in the first `steps` steps though it should be, in words; empty: nothing."""
        return ""

    def baselines(self, dataset: Dataset) -> dict[str, float]:
        """Values of the headline metric to compare with, by name: what a simpler method reaches."""
        return {}

    def pictures(self, dataset: Dataset) -> dict[str, tuple[Tensor, int]]:
        """By name, images [N, C, H, W] in [0, 1] and how many of them make a row."""
        raise NotImplementedError
