"""What has been proved on which GPU, and what impl="auto" takes there.

A kernel counts as proved on a GPU model when every op was compared with the reference in float64 on such a
GPU, value and gradients, in each dtype, and nothing failed. The rows of benchmarks/results/GPU_LEDGER.md name
commands, versions and results. A proof is about the kernels' sources as they were: where those change, their
fingerprint (benchmarks/gpu/fingerprint.py) no longer fits, and they have to be proved again. Which release of
nvcc compiles them does not count.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Proof(NamedTuple):
    """Kernels that were right on a GPU."""

    model: str  # as torch.cuda.get_device_name says it
    impl: str
    fingerprint: str  # of the kernels' sources
    commit: str
    triton: str = ""  # the release of Triton that compiled them, for its kernels


PROOFS: tuple[Proof, ...] = (
    Proof("NVIDIA H200", "cuda", "76aacf4cbd9bc9e3", "67d8fe9"),
    Proof("NVIDIA H200", "triton", "74b2c5ab0400b9b5", "67d8fe9", triton="3.6"),
)

# The first that is proved serves; where none is, the reference. Called from Python on an H200, the CUDA
# kernels were faster than Triton's in every case up to B = 128, since launching Triton's takes longer than
# the CUDA kernels take in total (benchmarks/results/NOTES.md).
ORDER = ("cuda", "triton")

# D and K up to which routing was compared, and the CUDA kernels do not fall back on plain loops.
_CUDA_LENGTHS = (32, 64)
# Above this, or for lengths that are not multiples of 4, Triton uses blocks that have not run on a GPU.
_TRITON_LENGTH = 16


def within_limits(impl: str, lengths: Sequence[int]) -> bool:
    """Whether capsules of these lengths, D and K of a routing op, are within what the proof covers."""
    if impl == "cuda":
        return all(length <= most for length, most in zip(lengths, _CUDA_LENGTHS, strict=False))
    return all(length <= _TRITON_LENGTH and length % 4 == 0 for length in lengths)
