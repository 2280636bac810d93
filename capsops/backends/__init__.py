"""Who computes the ops: a record for each backend, none of which knows another."""

from capsops.backends import cpu, cuda, reference, triton
from capsops.backends.backend import Backend

# impl="auto" tries them from the last to the first. Called from Python on an H200, the CUDA kernels were
# faster than Triton's in every case up to B = 128: to launch Triton's takes longer than the CUDA kernels take
# in all (benchmarks/results/NOTES.md).
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (reference.BACKEND, cpu.BACKEND, triton.BACKEND, cuda.BACKEND)
}
