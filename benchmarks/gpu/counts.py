"""Counts one launch: what its kernel takes, and the cycles of a multiprocessor in the model of cycles.py."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.gpu import cycles, flow, sass
from benchmarks.gpu.occupancy import MULTIPROCESSORS, resident_blocks
from benchmarks.gpu.walk import Launch, Walk

SAMPLES = 32  # what is counted is per so many samples and one input capsule
_EXPONENTIAL = "MUFU.EX2"
FIRST, LATER, GRADIENTS, OTHER = "first pass", "later pass", "gradients", "other"


@dataclass(frozen=True)
class Count:
    """What one launch takes."""

    kernel: str
    role: str  # first pass, later pass, gradients, other
    registers: int
    spills: int
    warps: int  # of a block
    shared: int  # bytes of a block
    resident: int  # blocks of a multiprocessor
    blocks: int
    cycles: int  # of the whole launch on one multiprocessor
    inner_cycles: int  # of its inner loops with nothing around them
    straight_line_cycles: float | None  # of the inner loops for one input capsule, see Kernel.straight_line
    l2_bytes: int  # that one multiprocessor reads and writes
    stored_bytes: int  # that the whole launch writes
    issued: int  # instructions
    inner_instructions: dict[str, int]  # by kind, the most frequent first
    busy: dict[str, float]  # share of the time that each pipe is in use

    def per_unit(self, number: float, units: float) -> float:
        """Of a multiprocessor, for 32 samples and one input capsule."""
        return number * MULTIPROCESSORS / units


def title(name: str) -> str:
    """passes_kernel<Tf32> for what the compiler made of it."""
    if name.startswith("triton "):
        return name
    parts = re.findall(r"\d+([a-z_]+_kernel)", name)
    kinds = ("Tf32", "MultiplyAdds", "bfloat16", "half")
    kind = next((kind for kind in kinds if kind in name), "")
    return (parts[-1] if parts else name) + (f"<{kind}>" if kind else "")


_COPIES = ("LDGSTS", "UBLKCP", "UTMALDG")


def _has_products(instructions: Sequence[sass.Instruction]) -> bool:
    """By tensor cores or by multiply-adds."""
    names = flow.kinds(instructions)
    return names["HMMA"] + names["HGMMA"] > 0 or names["FFMA"] >= 48


class Kernel:
    """A kernel with all that is prepared once for its launches."""

    def __init__(self, function: sass.Function, usage: sass.Usage) -> None:
        self.function, self.usage = function, usage
        self.walk, self.flow = Walk(function), flow.Flow(function)
        asynchronous = any(x.name in _COPIES for x in function.instructions)
        self.copying = _COPIES if asynchronous else ("LDG",)  # what brings the next stage

    def _copies(self, instructions: Sequence[sass.Instruction]) -> bool:
        return any(x.name in self.copying for x in instructions)

    def role(self, trace: Sequence[cycles.Step]) -> str:
        if self._stages(trace) is None:
            return OTHER
        if "gradient" in self.function.name:
            return GRADIENTS
        return LATER if any(x.instruction.opcode == _EXPONENTIAL for x in trace) else FIRST

    def _ran(self, trace: Sequence[cycles.Step]) -> Callable[[flow.Loop], list[sass.Instruction]]:
        """A function that lists those instructions of a loop that the warp executed."""
        executed = {step.instruction.address for step in trace}
        return lambda loop: [x for x in self.flow.all(loop) if x.address in executed]

    def _stages(self, trace: Sequence[cycles.Step]) -> flow.Loop | None:
        """The loop over stages: the deepest one that copies, computes products and has a barrier."""
        ran = self._ran(trace)
        candidates = [
            loop
            for loop in self.flow.loops
            if _has_products(code := ran(loop)) and any(x.name == "BAR" for x in code)
        ]
        return max(candidates, key=lambda loop: (self._copies(ran(loop)), loop.depth), default=None)

    def inner(self, trace: Sequence[cycles.Step]) -> list[cycles.Step]:
        """The part of a warp's steps that is in the inner loops, with the barriers between them.

        Inside the loop over stages, the loops that copy nothing are the inner ones. The barrier after the
        wait for copies is not theirs. Where there are no loops inside, all of it counts.
        """
        stages = self._stages(trace)
        if stages is None:
            return list(trace)
        ran = self._ran(trace)
        inside = [
            loop
            for loop in self.flow.loops
            if loop.parent is stages and (code := ran(loop)) and not self._copies(code)
        ]
        everything = {x.address for x in self.flow.all(stages)}
        own = {x.address for loop in inside for x in self.flow.all(loop)} or everything
        steps, waited = [], False
        for step in trace:
            name, address = step.instruction.name, step.instruction.address
            if name == "BAR" and address in everything and address not in own:
                if not waited:
                    steps.append(step)
                waited = False
            elif address in own:
                steps.append(step)
            waited = waited or name == "DEPBAR"
        return steps

    def _straight_line(self, block: Sequence[Sequence[cycles.Step]]) -> float | None:
        """Cycles for one input capsule, if each turn of an inner loop took the code from its first address to
        its last, loops inside it once and both sides of branches: an estimate that needs no walk.

        It is of the block's first stage, whose input capsules are the turns of the loop with the most. None
        where the inner loops have no loops around them.
        """
        stages, ran = self._stages(block[0]), self._ran(block[0])
        if stages is None:
            return None
        loops = [x for x in self.flow.nested() if x.parent is stages]
        inside = [x for x in loops if (code := ran(x)) and not self._copies(code)]
        barrier = next(x for x in self.flow.all(stages) if x.name == "BAR")
        most, warps = 0, []
        for trace in block:
            addresses = [step.instruction.address for step in trace]
            head = self.function.instructions[stages.head].address
            first = addresses.index(head)
            later = [n for n, address in enumerate(addresses) if address == head and n > first]
            stage = Counter(addresses[first : later[0] if later else None])
            parts = []
            for loop in inside:
                begin = self.function.instructions[loop.head].address
                straight = [
                    cycles.step(x)
                    for x in self.function.instructions
                    if begin <= x.address <= self._end(loop)
                ]
                parts.append(straight * stage[begin])
                most = max(most, stage[begin])
            between = [cycles.step(barrier)]
            warps.append([step for n, part in enumerate(parts) for step in (between if n else []) + part])
        return cycles.simulate(warps).cycles / most if most else None

    def _end(self, loop: flow.Loop) -> int:
        """The address of the last branch back to the head."""
        blocks = [self.flow.blocks[n] for n in loop.body]
        last = max(block.last for block in blocks if loop.head in block.successors)
        return self.function.instructions[last].address

    def role_of(self, launch: Launch) -> str:
        return self.role(self.walk.trace(launch, 0, 0))

    def count(self, launch: Launch) -> Count:
        """Blocks are taken to run in rounds of as many as are resident."""
        resident = resident_blocks(self.usage, launch.warps, launch.shared)
        here = min(resident, -(-launch.blocks // MULTIPROCESSORS))
        rounds = -(-launch.blocks // (MULTIPROCESSORS * resident))
        # Those that a multiprocessor gets: one of each 132, which are neighbours' in their work.
        blocks = [min(n * MULTIPROCESSORS, launch.blocks - 1) for n in range(here)]
        traces, of_block = [], []
        for n, block in enumerate(blocks):
            for warp in range(launch.warps):
                traces.append(self.walk.trace(launch, block, warp))
                of_block.append(n)
        whole = cycles.simulate(traces, of_block)
        stored = sum(step.stored for steps in traces for step in steps)
        inner = [self.inner(trace) for trace in traces]
        inside = cycles.simulate(inner, of_block)
        kinds = flow.kinds([step.instruction for steps in inner for step in steps])
        return Count(
            kernel=title(launch.name),
            role=self.role(traces[0]),
            registers=self.usage.registers,
            spills=sass.spills(self.function),
            warps=launch.warps,
            shared=launch.shared,
            resident=resident,
            blocks=launch.blocks,
            cycles=whole.cycles * rounds,
            inner_cycles=inside.cycles * rounds,
            l2_bytes=round(whole.busy["l2"] * cycles.L2_BYTES) * rounds,
            stored_bytes=round(stored / here * launch.blocks),
            issued=whole.issued * rounds,
            inner_instructions={kind: n * rounds for kind, n in kinds.most_common()},
            straight_line_cycles=self._straight_line(traces[: launch.warps]),
            busy={pipe: round(n / whole.cycles, 3) for pipe, n in whole.busy.most_common()},
        )
