"""What has been proved on which GPU, and the order in which impl="auto" takes it there.

A kernel counts as proved on a GPU model when every op was compared with the reference in float64 on such a
GPU, value and gradients, in each dtype, and nothing failed: rows of benchmarks/results/GPU_LEDGER.md, which
names commands, versions and results. A row is about the kernels' sources as they were. Where those change,
their fingerprint (benchmarks/gpu/fingerprint.py) no longer fits and the row has to be earned again.
"""

from typing import NamedTuple


class Proof(NamedTuple):
    """Kernels that were right on a GPU."""

    model: str  # as torch.cuda.get_device_name says it
    impl: str
    fingerprint: str  # of the kernels' sources
    triton: str = ""  # the release of Triton that compiled them, for its kernels
    commit: str = ""


PROOFS: tuple[Proof, ...] = (
    Proof("NVIDIA H200", "cuda", "560e71c921ca91c4", commit="67d8fe9"),
    Proof("NVIDIA H200", "triton", "b32dda5878b53494", triton="3.6", commit="COMMIT"),
)

# By op, the first that is proved serves; where none is, the reference. Backward ops follow their forward op.
# From the times in benchmarks/results/gpu-nvidia-h200.json, by calls and by graph replay: Triton's kernels
# are the fastest for predictions, and take longer to start than the CUDA kernels need for the whole routing.
ORDER = {
    "squash": ("cuda", "triton"),
    "predictions": ("triton",),
    "dynamic_routing": ("cuda", "triton"),
    "capsule_routing": ("cuda", "triton"),
    "couplings": ("cuda", "triton"),
}

# Components of an output capsule up to which the CUDA kernels for routing are fused.
CUDA_OUT_DIM = 32
