"""`python -m benchmarks.gpu_counts`: what each CUDA kernel takes of a multiprocessor, read without a GPU.

python -m benchmarks.gpu_counts --cubin FILE --function NAME [--warps 8]

    lists the loops of one kernel in any cubin: instructions by kind, and cycles of a turn in the cycle model
"""

import argparse
from pathlib import Path

from benchmarks.gpu import cycles, flow, sass

TURNS = 12  # of a loop, of which the first ones start the pipes


def turn_cycles(turn: list[sass.Instruction], warps: int) -> tuple[float, float]:
    """Cycles of a turn once the loop runs, and instructions issued a cycle."""
    steps = [cycles.step(instruction) for instruction in turn]
    first, all_turns = (cycles.simulate([steps * n] * warps) for n in (TURNS // 3, TURNS))
    more = all_turns.cycles - first.cycles
    return more / (TURNS - TURNS // 3), (all_turns.issued - first.issued) / more


def print_loops(cubin: Path, wanted: str, warps: int) -> None:
    usages, functions = sass.usages(cubin), sass.functions(cubin)
    names = [name for name in functions if wanted in name]
    if not names:
        raise SystemExit(f"{cubin} has no function with {wanted!r} in its name, but {', '.join(functions)}")
    for name in names:
        function, usage = functions[name], usages[name]
        print(f"{name}: {usage.registers} registers, {sass.spills(function)} spills", end="")
        print(f", {usage.stack} bytes of stack, {len(function.instructions)} instructions")
        control = flow.Flow(function)
        for loop in control.nested():
            head = function.instructions[loop.head].address
            own, indent = control.own(loop), "  " * (loop.depth + 1)
            listed = ", ".join(f"{n} {kind}" for kind, n in flow.kinds(own).most_common(10))
            print(f"{indent}{head:#06x} {flow.purpose(control.all(loop))}: {len(own)} of its own ({listed})")
            if control.innermost(loop):
                turn = control.turn(loop)
                each, rate = turn_cycles(turn, warps)
                print(
                    f"{indent}  {len(turn)} instructions and {each:.0f} cycles a turn of {warps} warps",
                    end="",
                )
                print(f", {rate:.2f} instructions a cycle")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cubin", type=Path, required=True)
    parser.add_argument("--function", default="", help="a part of the kernel's name")
    parser.add_argument("--warps", type=int, default=8, help="of a multiprocessor")
    args = parser.parse_args()
    print_loops(args.cubin, args.function, args.warps)


if __name__ == "__main__":
    main()
