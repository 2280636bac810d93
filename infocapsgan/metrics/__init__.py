"""What is measured of a trained system, in groups: a module for each group, which registers itself."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

Measured = tuple[dict[str, float], dict[str, Any]]
"""Metrics by name, and further details for evaluation.json."""


class Group(NamedTuple):
    """A group of metrics."""

    why_not: Callable[..., str]  # (system, dataset): why it does not apply to them; empty where it does
    measure: Callable[..., Measured]  # (system, dataset, samples): so many images, where it generates any


GROUPS: dict[str, Group] = {}
HIGHER_IS_BETTER = {"accuracy", "unsupervised_accuracy", "nmi", "ari", "sample_precision", "sample_recall"}
LOWER_IS_BETTER = {"error", "pair_error", "margin_loss", "squared_error", "frechet_distance"}


def register(name: str, why_not: Callable[..., str]) -> Callable:
    """Registers the function that it decorates as the group `name`."""
    return lambda measure: GROUPS.setdefault(name, Group(why_not, measure)).measure


def unless_labelled(ability: str) -> Callable[..., str]:
    """The `why_not` of groups that take a system with `ability` and images with labels."""
    unlabelled = "its images have no labels"
    return lambda system, dataset: system.why_not(ability) or ("" if dataset.labelled else unlabelled)


def best(name: str, values: list[float]) -> float | None:
    """The best of a metric's values; None where neither more nor less of it is better."""
    if name in HIGHER_IS_BETTER:
        return max(values)
    return min(values) if name in LOWER_IS_BETTER else None


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
