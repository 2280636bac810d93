import os
from collections.abc import Iterator

import pytest

# Before anything imports matplotlib.
os.environ["MPLBACKEND"] = "Agg"
# Before anything imports torch: threads that spin while they wait take processors that others could use.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import torch

# Compilation and the first call of a kernel take as long as they take; pytest-timeout watches the whole test.
hypothesis.settings.register_profile("capsops", deadline=None, derandomize=True)
hypothesis.settings.load_profile("capsops")

# Tensors of tests are small: waiting for a second thread costs more than it gives. See test_threads.py.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Whatever a test sets, the next begins with one."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
