"""What has been proved on which GPU, and what impl="auto" takes there.

A kernel counts as proved on a GPU model when every op was compared with the reference in float64 on such a
GPU, value and gradients, in each dtype, and nothing failed. The rows of benchmarks/results/GPU_LEDGER.md name
commands, versions and results. A proof is about the kernels' sources as they were: where those change, their
fingerprint (benchmarks/gpu/fingerprint.py) no longer fits, and it has to be earned again.
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
    Proof("NVIDIA H200", "cuda", "560e71c921ca91c4", "67d8fe9"),
    Proof("NVIDIA H200", "triton", "24674ba37678e4f9", "67d8fe9", triton="3.6"),
)

# By op, the first that is proved serves; where none is, the reference. A gradient follows its op. By the
# times on an H200 in benchmarks/results/NOTES.md: for predictions Triton's kernels are the fastest, and the
# CUDA kernels slower than plain PyTorch with their gradient; elsewhere Triton's take longer to start than
# CUDA's to end.
ORDER = {
    "squash": ("cuda", "triton"),
    "predictions": ("triton",),
    "dynamic_routing": ("cuda", "triton"),
    "capsule_routing": ("cuda", "triton"),
    "couplings": ("cuda", "triton"),
}

_CUDA_DIMS = (32, 1024)  # D and K beyond which the CUDA kernels route by plain loops
_TRITON_DIM = 16  # beyond it, or off multiples of 4, Triton's take blocks that have not run on a GPU


def within_limits(impl: str, op: str, lengths: Sequence[int]) -> bool:
    """Whether capsules of these lengths, D and K of a routing op, are such as the proof is about."""
    if impl == "cuda":
        return all(length <= most for length, most in zip(lengths, _CUDA_DIMS, strict=False))
    if op not in ("capsule_routing", "couplings"):
        return True
    return all(length <= _TRITON_DIM and length % 4 == 0 for length in lengths)
