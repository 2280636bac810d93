"""The proofs that ship with the package.

Kernels count as proved on a GPU model when every op was compared with the reference in float64 on such a
GPU, value and gradients, in each dtype, and no comparison failed. benchmarks/results/GPU_LEDGER.md has the
commands, versions and results. A proof is about the kernels' sources as they were: where those change, their
fingerprint (capsops/backends/fingerprint.py) no longer fits, and they have to be proved again. The release of
nvcc that compiles them does not count.
"""

from typing import NamedTuple

from capsops.proofs.scope import Scope


class Proof(NamedTuple):
    """Where a backend's kernels were compared with the reference on a GPU, and no comparison failed."""

    model: str  # of the GPU, as torch.cuda.get_device_name returns it
    backend: str
    kernels: str  # as the backend names them: the fingerprint of their sources, and what compiled them
    commit: str
    scope: Scope


# None at present: the kernels that ran on an H200 (67d8fe9 in the ledger) have been replaced since.
PROOFS: tuple[Proof, ...] = ()


def proof(model: str, backend: str, kernels: str) -> Proof | None:
    """The proof of a backend's kernels, as it names them, on a GPU model."""
    wanted = model, backend, kernels
    return next((each for each in PROOFS if (each.model, each.backend, each.kernels) == wanted), None)
