"""What the training loop, metrics, pictures and commands know of a system."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from capsops.nn import RoutingCapsules
from infocapsgan import data
from infocapsgan.data import Dataset, ImageShape
from infocapsgan.data.dataset import to_symmetric
from infocapsgan.engine.settings import Settings as BaseSettings
from infocapsgan.engine.train_state import TrainState
from infocapsgan.models.capsule_encoder import CapsuleEncoder, Capsules, StackedCapsuleEncoder
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
"""What only some systems can do, and why a system that does not define such a method lacks it."""


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
    networks: ClassVar[tuple[str, ...]] = ("model",)
    """The modules that a step calls, by name, which is what --compile compiles."""
    headline: ClassVar[str]
    """The metric that the progress bar and the last line of a run show."""
    terms: ClassVar[dict[str, str]] = {
        "discriminator": "(loss: real or generated)",
        "generator": "(loss: deceive the discriminator)",
        "real_accuracy": "(real images that the discriminator calls real)",
        "generated_accuracy": "(generated images that it calls generated)",
        "discriminator_accuracy": "(mean of both; 0.5: it cannot tell)",
        "frechet_distance": "↓",
        "information": "↑ (mutual information of image and class, nats)",
        "consistency": "↓ (divergence between an image and its augmented copy, nats)",
        "smoothness": "↓ (divergence under the worst small change of an image, nats)",
        "code": "↓ (class code recognised in generated images)",
        "diversity": "↓ (images of one code differ as their noise does)",
        "categorical": "↓ (cross-entropy of the categorical code)",
        "continuous": "↓ (squared error of the continuous codes)",
        "meaning": "↓ (error of the continuous codes of changed copies)",
        "unsupervised_accuracy": "↑",
        "nmi": "↑ (normalised mutual information)",
        "ari": "↑ (adjusted Rand index)",
        "margin": "↓ (margin loss of the class capsules' lengths)",
        "reconstruction": "↓ (error of an image, summed over its pixels)",
        "margin_loss": "↓",
        "squared_error": "↓ (of a reconstruction, summed over its pixels)",
        "validation_loss": "↓",
        "batch_accuracy": "↑",
        "accuracy": "↑",
        "pair_error": "↓",
    }
    """What the numbers that systems log are, for legends: ↑ where more is better, ↓ where less is."""

    settings: Any  # of the class Settings
    optimizers: dict[str, torch.optim.Optimizer]
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
        self.settings = s = settings
        self.image_shape = image_shape or data.image_shape(s.dataset, s.data_dir, image_size=s.image_size)
        self.optimizers = {}
        self.register_buffer("label_of_code", torch.full((self.codes,), -1) if self.codes else None)

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

    def compile_networks(self, backend: str = "inductor") -> None:
        """Lets torch.compile compile each network; names of weights stay as they are."""
        for network in self.networks:
            self.get_submodule(network).compile(backend=backend, dynamic=False)

    def class_name(self, labels: Tensor | int) -> str:
        """The name of a label; of several labels of one image, joined by +."""
        numbers = labels.flatten().tolist() if isinstance(labels, Tensor) else [labels]
        return "+".join(self.class_names[n] if self.class_names else str(n) for n in numbers)

    @property
    def code_names(self) -> list[str]:
        """Each class code, and the name of the label that evaluate() matched it with, if it did."""
        labels = [] if self.label_of_code is None else self.label_of_code.tolist()
        return [str(code) + f" ({self.class_name(n)})" * (n >= 0) for code, n in enumerate(labels)]

    @property
    def code_label(self) -> str:
        """What `code_names` are, for an axis."""
        return "class code" + " (class)" * any("(" in name for name in self.code_names)

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

    def why_not(self, ability: str) -> str:
        """Why the system lacks one of ABILITIES; empty where it has it."""
        return "" if hasattr(type(self), ability) else ABILITIES[ability]

    def require(self, ability: str, purpose: str, *others: str) -> None:
        """Raises NotApplicableError where the system has none of these ABILITIES: for what; who has."""
        abilities = (ability, *others)
        if all(reasons := [self.why_not(one) for one in abilities]):
            able = [name for name, kind in SYSTEMS.items() if any(hasattr(kind, one) for one in abilities)]
            reason = f"{' and '.join(reasons)}; it applies to {', '.join(able)}"
            raise NotApplicableError(f"{purpose} does not apply to this {self.name}: {reason}")

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

    classify: Callable[[Tensor], Tensor]
    """Images → probabilities [N, J] of the labels that the system was trained with; see the system."""
    test_predictions: Callable[[Dataset], dict[str, Tensor]]
    """With classify: for each test image of a data set its `predicted` label and its losses, by name."""
    cluster: Callable[[Tensor], Tensor]
    """Images → the class code [N] of each, learned without labels: 0 … codes − 1."""
    code_probabilities: Callable[[Tensor], Tensor]
    """With cluster: images → the probability of each class code [N, codes]; each row adds up to 1."""
    generate: Callable[[Tensor], Tensor]
    """Latent vectors [N, …] → images [N, C, H, W] in [0, 1]."""
    random_latents: Callable[..., Tensor]
    """With generate: (number, rng, *, images, code, continuous) → latent vectors [number, …] as in training.

    `images` are real ones, for a system whose latents are computed from them; `code` and `continuous` are
    those that latents() takes, where they are not to be random.
    """
    latents: Callable[..., Tensor]
    """Normal values [N, noise_dim], class codes [N] and continuous codes [N, …] → latent vectors.

    Codes are optional; those that the system does not have are ignored. Continuous codes are 0 if left out.
    """
    reconstruct: Callable[[Tensor], Tensor]
    """Images → what the system makes of its representation of them [N, C, H, W] in [0, 1]."""
    decode: Callable[[Tensor, Tensor], Tensor]
    """Class capsules [N, J, D], classes [N] → images in [0, 1] made from the capsules of these only."""
    reconstruction_sheet: Callable[[Dataset], Sheet]
    """With decode: test images and their reconstructions from the true and from the predicted label."""
    capsules: Callable[[Tensor], Capsules]
    """Images → primary capsules [N, I, K] and class capsules [N, J, D]."""
    routing: RoutingCapsules
    """The layer that routes primary capsules to class capsules."""


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
    def routing(self) -> RoutingCapsules:  # type: ignore[override]  # no system sets it
        """The encoder's routing layer."""
        return self.encoder.classes
