"""What the training loop, metrics, pictures and commands know of a system."""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from capsops.nn import RoutingCapsules
from infocapsgan import data
from infocapsgan.data import Dataset, ImageShape
from infocapsgan.data.dataset import to_symmetric
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.settings import Settings as BaseSettings
from infocapsgan.engine.train_state import TrainState
from infocapsgan.models.capsule_encoder import CapsuleEncoder, Capsules
from infocapsgan.models.stacked_encoder import StackedCapsuleEncoder
from infocapsgan.plotting.sheet import Sheet

SYSTEMS: dict[str, type["System"]] = {}
"""The systems by the names of the command line; each registers itself: `class InfoGAN(…, name="infogan")`."""

ABILITIES = {
    "classify": "it is not trained with labels",
    "cluster": "it has no class code",
    "generate": "it has no generator",
    "latents": "it generates no images from noise",
    "reconstruct": "it reconstructs no images",
    "decode": "it has no decoder",
    "capsules": "it has no capsules",
    "routing": "it has no routing layer",
}
"""What only some systems can do: methods of System, and why a system that does not define one lacks it."""


class NotApplicableError(ValueError):
    """What was asked for does not exist for this system."""


class System(nn.Module):
    """Networks, optimisers, one training step, and what the trained system can do.

    An ordinary module: `InfoCapsGAN(dataset="mnist").generator` works in anybody's loop. Every method takes
    images as uint8 [N, C, H, W], or as float in [0, 1]; what a single network takes, it says itself.

    A system defines those of the methods in ABILITIES that it can do. Metrics, pictures and commands ask
    why_not() for them, never for the class.

    Args:
        settings: what defaults() returns, or what a run was started with.
        image_shape: of the images; None: that of the data set in the settings.
        options: instead of settings, those that differ from the defaults.
    """

    name: ClassVar[str]
    """What the command line calls the system."""
    Settings: ClassVar[type[BaseSettings]]
    recipes: ClassVar[dict[str, dict[str, Any]]]
    """For each recipe, the options whose defaults differ from those of `Settings`."""
    datasets: ClassVar[dict[str, dict[str, Any]]] = {}
    """For a data set, the options whose defaults differ."""
    tuned: ClassVar[dict[str, dict[str, Any]]] = {}
    """For a data set, those that differ under the recipe tuned only."""
    headline: ClassVar[str]
    """The metric that the progress bar and the last line of a run show."""
    terms: ClassVar[dict[str, str]] = {}
    """What the numbers that the system logs are, for legends: ↑ where more is better, ↓ where less is."""

    settings: Any  # of the class Settings
    optimizers: dict[str, Optimizer]
    class_names: tuple[str, ...] = ()
    """A short name for each label of the data; empty where the system was made without its data."""
    label_of_code: Tensor | None
    """The label that evaluate() matched each class code with [codes], −1: none; None without a class code."""

    def __init_subclass__(cls, name: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        if name:
            cls.name = name
            SYSTEMS[name] = cls

    def __init__(
        self, settings: BaseSettings | None = None, *, image_shape: ImageShape | None = None, **options: Any
    ) -> None:
        super().__init__()
        if settings is None:
            settings = self.configure(**options)
        elif options:
            raise ValueError(f"settings and options exclude one another, got both, with {', '.join(options)}")
        self.settings = settings
        self.image_shape = image_shape or data.image_shape(
            settings.dataset, settings.data_dir, image_size=settings.image_size
        )
        self.optimizers = {}
        self.register_buffer("label_of_code", None)

    @classmethod
    def defaults(cls, recipe: str = "tuned", dataset: str = "digits") -> BaseSettings:
        """The settings of a recipe on a data set."""
        settings = cls.Settings(recipe=recipe, dataset=dataset)  # type: ignore[arg-type]  # checked there
        options = cls.datasets.get(dataset, {}) | cls.recipes[recipe]
        options |= cls.tuned.get(dataset, {}) if recipe == "tuned" else {}
        if dataset == "folder":  # the number of its images chooses, see engine/start.py
            options |= {"batch_size": None, "epochs": None}
        return dataclasses.replace(settings, **options)

    @classmethod
    def configure(cls, **options: Any) -> BaseSettings:
        """The defaults of the recipe and the data set among the options, with the other options set."""
        chosen = {name: options[name] for name in ("recipe", "dataset") if name in options}
        return dataclasses.replace(cls.defaults(**chosen), **options)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def networks(self) -> list[nn.Module]:
        """The modules that a step calls, which is what --compile compiles."""
        return list(self.children())

    def compile_networks(self, backend: str = "inductor") -> None:
        """Lets torch.compile compile each network; names of weights stay as they are."""
        for network in self.networks:
            network.compile(backend=backend, dynamic=False)

    def class_name(self, labels: Tensor | int) -> str:
        """The name of a label; of several labels of one image, joined by +."""
        numbers = labels.flatten().tolist() if isinstance(labels, Tensor) else [labels]
        return "+".join(self.class_names[n] if self.class_names else str(n) for n in numbers)

    def code_name(self, code: int) -> str:
        """A class code, and the name of the label that evaluate() matched it with, if it did."""
        label = -1 if self.label_of_code is None else int(self.label_of_code[code])
        return str(code) if label < 0 else f"{code} → {self.class_name(label)}"

    @property
    def code_names(self) -> list[str]:
        """All class codes, as code_name() shows them."""
        return [self.code_name(code) for code in range(self.codes)]

    @property
    def code_label(self) -> str:
        """What `code_names` are, for an axis."""
        return "class code" + " → class" * any("→" in name for name in self.code_names)

    # Training.

    def load_data(self) -> Dataset:
        """The data set in the settings."""
        s = self.settings
        return data.load(s.dataset, s.data_dir, image_size=s.image_size)

    def step(self, images: Tensor, labels: Tensor, state: TrainState) -> dict[str, Tensor]:
        """One training step on images [B, C, H, W] as uint8 and labels [B]; returns named losses."""
        raise NotImplementedError

    def evaluate(self, dataset: Dataset) -> dict[str, float]:
        """Metrics on the whole of `dataset`; no random number of the training is used."""
        raise NotImplementedError

    def sample_quality(self, dataset: Dataset) -> dict[str, float]:
        """How close generated images are to those of `dataset`, where the settings ask for it."""
        return {}

    @property
    def validation_share(self) -> float:
        """The share of the training images that is held out to choose weights by; 0: none."""
        return 0.1 if getattr(self.settings, "validation", False) else 0.0

    def validation_loss(self, held_out: Dataset) -> float:
        """The loss, on the test images of `held_out`, that is lowest for the weights that are kept."""
        raise NotImplementedError

    def untrained(self, steps: int) -> str:
        """Which part is not trained after `steps` steps although it should be, in words; empty: none."""
        return ""

    def baselines(self, dataset: Dataset) -> dict[str, float]:
        """Values of the headline metric that simpler methods reach, by name."""
        return {}

    def pictures(self, dataset: Dataset) -> dict[str, Sheet]:
        """The pictures that training writes at each evaluation, by name."""
        raise NotImplementedError

    # Abilities.

    def why_not(self, ability: str) -> str:
        """Why the system lacks one of ABILITIES; empty where it has it."""
        return "" if self._defines(ability) else ABILITIES[ability]

    @classmethod
    def _defines(cls, ability: str) -> bool:
        return getattr(cls, ability) is not getattr(System, ability)

    def require(self, ability: str, purpose: str) -> None:
        """Raises NotApplicableError, which says which systems have the ability, where this one lacks it.

        Args:
            ability: one of ABILITIES.
            purpose: what it is needed for, as the error names it.
        """
        if reason := self.why_not(ability):
            able = ", ".join(name for name, system in SYSTEMS.items() if system._defines(ability))
            raise NotApplicableError(
                f"{purpose} does not apply to this {self.name}: {reason}; it applies to {able}"
            )

    def classify(self, images: Tensor) -> Tensor:
        """Probabilities [N, J] of the labels that the system was trained with; see the system."""
        raise NotApplicableError(ABILITIES["classify"])

    def test_predictions(self, dataset: Dataset) -> dict[str, Tensor]:
        """With classify(): for each test image its `predicted` label and its losses, by name."""
        raise NotApplicableError(ABILITIES["classify"])

    def cluster(self, images: Tensor) -> Tensor:
        """The class code [N] of each image, learned without labels: 0 … codes − 1."""
        raise NotApplicableError(ABILITIES["cluster"])

    def code_probabilities(self, images: Tensor) -> Tensor:
        """With cluster(): the probability of each class code [N, codes]."""
        raise NotApplicableError(ABILITIES["cluster"])

    def generate(self, latents: Tensor) -> Tensor:
        """Latent vectors [N, …] → images [N, C, H, W] in [0, 1]."""
        raise NotApplicableError(ABILITIES["generate"])

    def random_latents(
        self, number: int, rng: ShardedGenerator, *, images: Tensor | None = None, **codes: Tensor
    ) -> Tensor:
        """With generate(): latent vectors [number, …], distributed as in training.

        Args:
            number: of vectors.
            rng: where random numbers come from.
            images: real ones, for a system whose latents are computed from them.
            codes: those that latents() takes, where they are not to be random.
        """
        raise NotApplicableError(ABILITIES["generate"])

    @property
    def noise_dim(self) -> int:
        """With latents(): how many normal values it takes, beside the codes."""
        return getattr(self.settings, "noise_dim", 0)

    @property
    def codes(self) -> int:
        """How many values the class code has; 0: there is none."""
        return 0

    @property
    def continuous_codes(self) -> int:
        """With latents(): how many continuous codes it takes, from −1 to 1 in training."""
        return getattr(self.settings, "continuous_codes", 0)

    def latents(self, noise: Tensor, code: Tensor | None = None, continuous: Tensor | None = None) -> Tensor:
        """Normal values [N, noise_dim], class codes [N] and continuous codes [N, …] → latent vectors.

        Codes that the system does not have are ignored; without continuous codes these are 0.
        """
        raise NotApplicableError(ABILITIES["latents"])

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images → what the system makes of its representation of them [N, C, H, W] in [0, 1]."""
        raise NotApplicableError(ABILITIES["reconstruct"])

    def decode(self, capsules: Tensor, classes: Tensor) -> Tensor:
        """Class capsules [N, J, D] → images in [0, 1] made from those of `classes` [N] only."""
        raise NotApplicableError(ABILITIES["decode"])

    def reconstruction_sheet(self, dataset: Dataset) -> Sheet:
        """With decode(): test images and their reconstructions from the true and from the predicted label."""
        raise NotApplicableError(ABILITIES["decode"])

    def capsules(self, images: Tensor) -> Capsules:
        """Images → primary capsules [N, I, K] and class capsules [N, J, D]."""
        raise NotApplicableError(ABILITIES["capsules"])

    @property
    def routing(self) -> RoutingCapsules:
        """The layer that routes primary capsules to class capsules."""
        raise NotApplicableError(ABILITIES["routing"])


class CapsuleSystem(System):
    """A system with a capsule encoder, which takes images in [−1, 1]."""

    @property
    def encoder(self) -> CapsuleEncoder | StackedCapsuleEncoder:
        """The network from images to capsules; of a GAN it is a part of the discriminator."""
        kinds = (CapsuleEncoder, StackedCapsuleEncoder)
        return next(module for module in self.modules() if isinstance(module, kinds))

    def capsules(self, images: Tensor) -> Capsules:
        """Primary capsules [N, I, 8] and class capsules [N, J, 16]."""
        return self.encoder(to_symmetric(images))

    @property
    def routing(self) -> RoutingCapsules:
        """The encoder's routing layer."""
        return self.encoder.classes
