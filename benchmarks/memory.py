"""Peak resident memory of a case, beyond its inputs and gradients, in a process of its own.

    python -m benchmarks.memory '{"routing": "einsum", "case": {"batch": 9}, "passes": "forward"}'

prints it in bytes. The profiler does not see what C++ allocates; the kernel's high-water mark of resident
pages does. It is reset when inputs exist, code is loaded and threads run, and after malloc has given back
what importing freed: otherwise that memory would serve the case unseen. Two marks are read, so that memory
of the forward pass does not hide behind gradients that do not exist yet: the first after the forward pass,
against the mark before it; the second after the backward pass, less the gradients, which exist by then. The
larger counts. v counts as memory of the case. The kernel counts pages per processor and adds up now and
then: a quarter of a mebibyte, about, is the resolution.
"""

import ctypes
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import capsops
from benchmarks import peers
from benchmarks.cases import Routing, RoutingCase, bound
from benchmarks.passes import FORWARD, run

ROOT = Path(__file__).resolve().parents[1]
CAPSOPS = "capsops"


def _status(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


class HighWater:
    """The high-water mark of resident memory since this was made."""

    def __init__(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _status("VmHWM")

    def bytes(self) -> int:
        return _status("VmHWM") - self.before


def available() -> bool:
    """Can this system reset and read the mark? Linux with glibc can."""
    try:
        HighWater()
    except (OSError, AttributeError):
        return False
    return True


def _capsops(u: Tensor, weight: Tensor, bias: Tensor | None, iterations: int) -> Tensor:
    return capsops.capsule_routing(u, weight, bias, iterations=iterations)


def _routing(name: str) -> Routing:
    if name == CAPSOPS:
        return _capsops
    return (peers.with_compiled(peers.ROUTING) if "compiled" in name else peers.ROUTING)[name]


def _measure(name: str, case: RoutingCase, passes: str) -> int:
    # The compiler's own memory is not the case's; for the rest a small call loads the code.
    small = RoutingCase(2, 3, 2, case.out_dim, case.in_dim, case.iterations, case.dtype)
    first = case if "compiled" in name else small
    function = bound(_routing(name), case)
    run(function, passes, *first.inputs())
    inputs, grad = case.inputs()
    mark = HighWater()
    if passes == FORWARD:
        run(function, passes, inputs, grad)
        return mark.bytes()
    v = function(*inputs)
    forward = mark.bytes()
    gradients = torch.autograd.grad(v, inputs, grad)
    return max(forward, mark.bytes() - sum(x.nbytes for x in gradients))


def peak_memory(routing: str, case: RoutingCase, passes: str, threads: int) -> int:
    """Bytes beyond inputs and gradients; `routing` is "capsops" or the name of a peer."""
    request = {"routing": routing, "case": asdict(case), "passes": passes, "threads": threads}
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(request)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[1:])}:\n{done.stderr}")
    return int(done.stdout)


def main(routing: str, case: dict, passes: str, threads: int) -> None:
    torch.set_num_threads(threads)
    print(_measure(routing, RoutingCase(**case), passes))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
