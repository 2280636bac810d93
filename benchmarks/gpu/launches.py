"""The launches of a call of routing: which kernels, how many blocks, which parameters; without a GPU.

The host code of the library plans and launches as it would on an H200; a stand-in for the CUDA runtime writes
down what it is asked to launch.
"""

import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache

from benchmarks.gpu import objects, sass
from benchmarks.gpu.walk import Launch
from capsops.measuring.cases import Case

FORWARD, BACKWARD = "forward", "backward"


@cache
def kernels(precision: str) -> dict[str, tuple[sass.Function, sass.Usage]]:
    """The kernels of routing in this precision, with their machine code."""
    result: dict[str, tuple[sass.Function, sass.Usage]] = {}
    for path in objects.objects(precision):
        if path.name.endswith(".cu.o"):
            usages = sass.usages(path)
            result |= {name: (function, usages[name]) for name, function in sass.functions(path).items()}
    return result


def _parsed(printed: str) -> Iterator[Launch]:
    for line in printed.splitlines():
        name, blocks, threads, shared, cluster, _, parameters = line.split(" ")
        yield Launch(name, int(blocks), int(threads), int(shared), bytes.fromhex(parameters), int(cluster))


def with_kernels(op: str, precision: str, case: Case) -> list[tuple[Launch, sass.Function, sass.Usage]]:
    """The launch of each step, with the machine code of its kernel."""
    known = kernels(precision)
    return [(launch, *known[launch.name]) for launch in recorded(op, precision, case)]


def recorded(op: str, precision: str, case: Case, cooperative: bool = False) -> list[Launch]:
    """`precision` is one of objects.PRECISIONS. Unless `cooperative`, each step is a launch of its own."""
    B, I, J, D, K = case.sizes  # noqa: E741
    sizes = [str(n) for n in (B, I, J, D, K, case.iterations)]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        for name, (_, usage) in kernels(precision).items():
            print(name, usage.registers, usage.shared, usage.parameters, file=file)
        file.flush()
        command = [str(objects.recorder(precision)), file.name, op, precision, *sizes, str(int(cooperative))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"recorded_launches: {done.returncode} {done.stderr}")
    return list(_parsed(done.stdout))
