"""Peak resident memory of a case, beyond its inputs and gradients, in a process of its own.

    python -m benchmarks.memory '{"form": "einsum", "case": {"batch": 9}, "passes": "forward", "threads": 1}'

prints it in bytes. The profiler does not see what C++ allocates; the kernel's high-water mark of resident
pages does. It is reset when inputs exist, code is loaded and threads run, and after malloc has returned what
importing freed. Of two marks the larger counts: the first after the forward pass; the second after the
backward pass, less the gradients, which exist by then. The resolution is about a quarter of a mebibyte.
"""

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

import capsops
from capsops.measuring import peers
from capsops.measuring.cases import Case
from capsops.measuring.passes import FORWARD, run

ROOT = Path(__file__).resolve().parents[1]


class HighWater:
    """The high-water mark of resident memory since this was made."""

    def __init__(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self._mark()

    def bytes(self) -> int:
        return self._mark() - self.before

    def _mark(self) -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def peak_of(call: Callable[[], tuple[torch.Tensor, ...]]) -> int:
    """Bytes that a call takes at its peak beyond the gradients that it returns; it has run before."""
    mark = HighWater()
    _, *gradients = call()
    return max(mark.bytes() - sum(x.nbytes for x in gradients), 1)


def available() -> bool:
    """Can this system reset and read the mark? Linux with glibc can."""
    try:
        HighWater()
    except (OSError, AttributeError):
        return False
    return True


def peak_memory(form: str, case: Case, passes: str) -> int:
    """Bytes beyond inputs and gradients; `form` is "ours" or the name of a peer. The result v counts."""
    threads = torch.get_num_threads()
    request = {"form": form, "case": asdict(case), "passes": passes, "threads": threads}
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(request)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[1:])}:\n{done.stderr}")
    return int(done.stdout)


def main(form: str, case: dict, passes: str, threads: int) -> None:
    torch.set_num_threads(threads)
    case = Case(**case)
    function = case.bind({"ours": getattr(capsops, case.op), **peers.FORMS[case.op]}[form])
    run(function, passes, *replace(case, batch=2, in_capsules=3, out_capsules=2).inputs())  # loads the code
    inputs, grad = case.inputs()
    mark = HighWater()
    if passes == FORWARD:
        run(function, passes, inputs, grad)
        peak = mark.bytes()
    else:
        v = function(*inputs)
        forward = mark.bytes()
        gradients = torch.autograd.grad(v, inputs, grad)
        peak = max(forward, mark.bytes() - sum(x.nbytes for x in gradients))
    print(peak)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
