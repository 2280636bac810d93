"""On which GPUs the kernels have been proved.

Kernels count as proved on a GPU model when every op was compared with the reference in float64 on such a
GPU, value and gradients, in each dtype, and no comparison failed. benchmarks/results/GPU_LEDGER.md has the
commands, versions and results. A proof is about the kernels' sources as they were: where those change, their
fingerprint (benchmarks/gpu/fingerprint.py) no longer fits, and they have to be proved again. The release of
nvcc that compiles them does not count.
"""

from capsops.backends.backend import Proof

PROOFS: tuple[Proof, ...] = (
    # Above D = 32 or K = 64 the CUDA kernels fall back on plain loops.
    Proof("NVIDIA H200", "cuda", "1bb87f0680c3843c", "67d8fe9", longest=(32, 64)),
)


def proof(model: str, backend: str) -> Proof | None:
    """The proof of a backend's kernels on a GPU model."""
    return next((each for each in PROOFS if (each.model, each.backend) == (model, backend)), None)
