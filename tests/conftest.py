import os
from collections.abc import Iterator

import pytest

# Before anything imports matplotlib.
os.environ["MPLBACKEND"] = "Agg"
# Before anything imports torch: threads that spin while they wait use cores that others need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import torch

# No deadline: compilation and a kernel's first call may take long. pytest-timeout limits the whole test.
hypothesis.settings.register_profile("capsops", deadline=None, derandomize=True)
hypothesis.settings.load_profile("capsops")

# The tensors of tests are small: to wait for a second thread costs more than it saves. See test_threads.py.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Resets the number of threads to one after every test."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
