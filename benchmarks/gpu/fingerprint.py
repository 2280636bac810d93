"""Fingerprints of the kernels' sources, and whether two builds have the same machine code.

python -m benchmarks.gpu.fingerprint                    that of each set of kernels
python -m benchmarks.gpu.fingerprint --same OLD NEW     whether two builds have the same machine code

Where sources change but the machine code stays the same, instruction for instruction, a proof on a GPU holds
for the new fingerprint too.
"""

import argparse
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from capsops.backends import fingerprint as kernels

ROOT = Path(__file__).resolve().parents[2]


def fingerprint(impl: str) -> str:
    """Of the sources of "cuda" or "triton" in this checkout."""
    return kernels.cuda(ROOT) if impl == "cuda" else kernels.triton(ROOT / "capsops/backends/triton")


def machine_code(library: Path) -> Counter[str]:
    """The instructions of each kernel for each architecture, without the kernels' names."""
    command = ["cuobjdump", "-sass", library]  # of the CUDA toolkit; Triton carries it too
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions: Counter[str] = Counter()
    for arch in re.split(r"\narch = ", printed)[1:]:
        for kernel in re.split(r"\n\s*Function : ", arch)[1:]:
            instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", kernel)
            functions[arch.split()[0] + "\n" + "\n".join(instructions)] += 1
    return functions


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--same", nargs=2, type=Path, metavar=("OLD", "NEW"))
    args = parser.parse_args()
    if args.same is None:
        for impl in ("cuda", "triton"):
            print(impl, fingerprint(impl))
        return
    old, new = map(machine_code, args.same)
    print(f"{old.total()} and {new.total()} kernels, {(old & new).total()} of them the same")
    sys.exit(old != new)


if __name__ == "__main__":
    main()
