import os

import pytest

# Before anything imports matplotlib.
os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import torch

# Compilation and the first call of a kernel take as long as they take; pytest-timeout watches the whole test.
hypothesis.settings.register_profile("capsops", deadline=None, derandomize=True)
hypothesis.settings.load_profile("capsops")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
