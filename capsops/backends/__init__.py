"""Who computes the ops: a record for each backend, none of which knows another."""

from capsops.backends import cpu, cuda, reference, triton
from capsops.backends.backend import Backend

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (reference.BACKEND, cpu.BACKEND, triton.BACKEND, cuda.BACKEND)
}
