"""What continuous codes mean on digits: how monotone slant and widths move along each code."""

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from infocapsgan.data import Dataset
from infocapsgan.data.dataset import in_batches
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.metrics import HIGHER_IS_BETTER, Measured, register
from infocapsgan.metrics.morphometry import MEASURES
from infocapsgan.systems.system import System

DIGIT_SETS = ("digits", "mnist")
ROWS_PER_CLASS, STEPS = 20, 11
HIGHER_IS_BETTER |= {f"{name}_rank_correlation" for name in MEASURES}


def _why_not(system: System, dataset: Dataset) -> str:
    if system.settings.dataset not in DIGIT_SETS:
        return f"slant and width are measured on {' and '.join(DIGIT_SETS)} only"
    return "" if system.continuous_codes else "it has no continuous codes"


@register("codes", _why_not)
def codes(system: System, dataset: Dataset, samples: int) -> Measured:
    """Spearman's rank correlation of slant, stroke width and digit width with each continuous code.

    Along rows in which only the code changes, from −1 to 1, averaged over the rows, 20 a class; a row along
    which a measure does not change counts as 0. The metrics are the largest absolute mean of any code.
    """
    values = torch.linspace(-1, 1, STEPS, device=system.device)
    rows = torch.arange(system.codes, device=system.device).repeat_interleave(ROWS_PER_CLASS)
    per_code: dict[str, list[float]] = {name: [] for name in MEASURES}
    for index in range(system.continuous_codes):
        latents = traversal(system, index, values, rows, ShardedGenerator(0, system.device))
        images = in_batches(system.generate, latents)
        for name, measure in MEASURES.items():
            per_code[name].append(mean_rank_correlation(values, measure(images).view(len(rows), -1)))
    metrics = {f"{name}_rank_correlation": max(map(abs, each)) for name, each in per_code.items()}
    return metrics, {f"{name}_of_each_code": each for name, each in per_code.items()}


def traversal(system: System, index: int, values: Tensor, codes: Tensor, rng: ShardedGenerator) -> Tensor:
    """Latents [R · V, …] of rows along which a continuous code goes through `values` and nothing else does.

    `index` is the number of that code, `values` [V] are along a row, `codes` [R] the class codes of the rows;
    the noise and the other continuous codes of each row are random.
    """
    R, V = len(codes), len(values)
    noise = rng.normal(R, system.noise_dim).repeat_interleave(V, dim=0)
    continuous = (rng.uniform(R, system.continuous_codes) * 2 - 1).repeat_interleave(V, dim=0)
    continuous[:, index] = values.repeat(R)
    return system.latents(noise, codes.repeat_interleave(V), continuous)


def mean_rank_correlation(values: Tensor, rows: Tensor) -> float:
    """Spearman's rank correlation of `rows` [R, V] with `values` [V], averaged; constant rows are 0."""
    numbers = values.cpu().numpy()
    each = [spearmanr(numbers, row).statistic if np.ptp(row) else 0.0 for row in rows.cpu().numpy()]
    return float(np.mean(each))
