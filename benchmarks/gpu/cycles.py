"""A rough cycle model of one multiprocessor of sm_90 (H100, H200).

Warps issue their instructions in order, on four schedulers that issue at most one a cycle. An instruction
waits for the pause that the compiler wrote behind the one before it, for the scoreboards that it names, and
for its pipe. The pauses and scoreboards are read from the machine code, the rest is assumed: see the tables
below. Not in the model: bank conflicts of registers, misses of the instruction cache, clocks that sink under
load, and what other multiprocessors do, but for their equal shares of the second-level cache. None of it was
fitted to a card. Beside an H200 it was within 10 % for long kernels and up to 57 % too low for short ones
(benchmarks/results/NOTES.md). It is good for comparing two versions of a kernel.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.gpu.sass import NO_BARRIER, Instruction

Lanes = npt.NDArray[Any]  # a number for each lane of a warp

SCHEDULERS = 4
WARP = 32

# Latencies in cycles: from the start in the pipe, after the pipe's own cycles, to the release of a
# scoreboard.
SHARED_LATENCY = 29  # loads from shared memory
EXCHANGE_LATENCY = 24  # shuffles, and what the multi-function unit computes
L2_LATENCY = 300  # loads and copies from global memory, which the second-level cache has
OPERANDS_READ = 8  # until the registers of an instruction may be overwritten
BARRIER_LATENCY = 25  # after the last warp has arrived
# What one multiprocessor gets of the second-level cache if all 132 read: 5120 bytes a cycle, three quarters
# of them in practice.
L2_BYTES = 5120 * 0.75 / 132
QUEUE = 4  # cycles of work that the memory pipe accepts ahead


class Cost(NamedTuple):
    """The pipe of an instruction, for how many cycles a warp takes it, and the latency after them."""

    pipe: str
    cycles: int
    latency: int = 0


# The pipes of a scheduler, and in brackets how many lanes they take a cycle. "memory" is the one pipe that
# all four schedulers share; its instructions take a cycle for each 128 bytes.
FMA, FMA_HEAVY, ALU, MUFU, TENSOR, BRANCH, MEMORY = (
    "fma",  # FFMA, FMUL, FADD (32)
    "fma heavy",  # IMAD (16)
    "alu",  # integers, logic, comparisons, conversions (16)
    "mufu",  # exponentials, reciprocals, conversions between int and float (4)
    "tensor",
    "branch",
    "memory",  # shared and global memory, shuffles (32)
)

_ALU = Cost(ALU, 2, 10)
_COSTS = {
    **dict.fromkeys(("FFMA", "FMUL", "FADD"), Cost(FMA, 1)),
    **dict.fromkeys(("IMAD", "HFMA2"), Cost(FMA_HEAVY, 2)),
    **dict.fromkeys(("F2FP", "R2UR", "S2R", "S2UR", "POPC", "P2R", "R2P", "VOTE", "VOTEU"), Cost(ALU, 2, 12)),
    **dict.fromkeys(("MUFU", "F2I", "I2F", "F2F", "FRND"), Cost(MUFU, 8, EXCHANGE_LATENCY)),
    **dict.fromkeys(("SHFL", "MOVM"), Cost(MEMORY, 1, EXCHANGE_LATENCY)),
    **dict.fromkeys(("LDC", "ULDC"), Cost(MEMORY, 1, 30)),
    **dict.fromkeys(("LDG", "LD"), Cost(MEMORY, 2, L2_LATENCY)),
    **dict.fromkeys(("STG", "ST", "RED", "ATOMS"), Cost(MEMORY, 2, 20)),
    "LDGSTS": Cost(MEMORY, 4, L2_LATENCY),
    **dict.fromkeys(("BRA", "BSSY", "BSYNC", "BREAK", "EXIT", "CALL", "RET", "BRX"), Cost(BRANCH, 1)),
    **dict.fromkeys(("NOP", "WARPSYNC", "YIELD", "BAR", "DEPBAR", "LDGDEPBAR"), Cost(BRANCH, 1)),
    **dict.fromkeys(("UCGABAR_ARV", "UCGABAR_WAIT"), Cost(BRANCH, 1)),
}


def bytes_of_lane(instruction: Instruction) -> int:
    """How many bytes each lane loads or stores."""
    if instruction.name == "LDSM":
        return 4 * int(instruction.modifiers[-1]) if instruction.modifiers[-1].isdigit() else 4
    for modifier, size in (("128", 16), ("64", 8), ("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2)):
        if modifier in instruction.modifiers:
            return size
    return 4


def _tensor_cycles(opcode: str) -> int:
    """Of m16n8k16 in 16 bit; k8 takes half as long, TF32 is slower by half (mma.sync, not wgmma)."""
    if "16816" in opcode:
        return 8
    return 6 if "TF32" in opcode else 4


@cache
def cost(instruction: Instruction) -> Cost:
    """What an instruction takes if its addresses are in different banks."""
    name = instruction.name
    if name == "HMMA":
        return Cost(TENSOR, _tensor_cycles(instruction.opcode))
    if name == "HGMMA":  # by four warps together, at the full rate: 4096 products a cycle in 16 bit
        m, n, k = map(int, instruction.modifiers[0].split("x"))
        return Cost(TENSOR, m * n * k // (2048 if "TF32" in instruction.opcode else 4096), 30)
    if name in ("LDS", "LDSM"):
        return Cost(MEMORY, max(bytes_of_lane(instruction) // 4, 1), SHARED_LATENCY)
    if name == "STS":
        return Cost(MEMORY, max(bytes_of_lane(instruction) // 4, 1), 20)
    return _COSTS.get(name, _ALU)


class Step(NamedTuple):
    """An instruction as one warp executes it."""

    instruction: Instruction
    pipe: str
    cycles: int
    latency: int
    l2_bytes: int  # that it moves between the second-level cache and the multiprocessor
    stored: int = 0  # bytes that its lanes write to global memory


_FROM_L2 = ("LDG", "LD", "LDGSTS", "STG", "ST")


@cache
def step(instruction: Instruction, cycles: int | None = None, lanes: int = WARP) -> Step:
    """The step of an instruction for which all lanes are active and all addresses fall in different banks,
    unless told otherwise."""
    base = cost(instruction)
    moved = bytes_of_lane(instruction) * lanes if instruction.name in _FROM_L2 else 0
    return Step(instruction, base.pipe, cycles or base.cycles, base.latency, moved)


_SECTOR = 32  # bytes of global memory that are moved together
_BANKS = 32  # of shared memory, of 4 bytes


def _wavefronts(addresses: Lanes, size: int) -> int:
    """How many cycles shared memory takes for accesses of `size` bytes a lane.

    It serves 128 bytes at a time: 32, 16 or 8 lanes; words of one bank in different rows take turns.
    """
    total, lanes = 0, 128 // size
    words = addresses[:, None] // np.uint64(4) + np.arange(size // 4, dtype=np.uint64)
    for first in range(0, len(addresses), lanes):
        distinct = np.unique(words[first : first + lanes])
        total += int(np.bincount((distinct % np.uint64(_BANKS)).astype(np.int64)).max())
    return total


@cache
def _access(instruction: Instruction, pattern: bytes, active: bytes, moved: bytes) -> Step:
    addresses, base = np.frombuffer(pattern, np.uint64), cost(instruction)
    lanes, from_l2 = np.frombuffer(active, bool), np.frombuffer(moved, bool)
    count = 0
    if instruction.name in _FROM_L2:
        size = 16 if instruction.name == "LDGSTS" else bytes_of_lane(instruction)
        sectors = addresses[from_l2] // np.uint64(_SECTOR)
        count = len(np.unique(sectors)) * _SECTOR if size <= _SECTOR else size * int(from_l2.sum())
    if not lanes.any():
        return Step(instruction, base.pipe, 1, base.latency, 0)
    taken = base.cycles
    if instruction.name in ("LDS", "STS"):
        taken = _wavefronts(addresses[lanes], max(bytes_of_lane(instruction), 4))
    elif instruction.name in ("LDSM", "STSM"):  # lanes 8 m ... 8 m + 7 have the rows of matrix m, of 16 bytes
        matrices = bytes_of_lane(instruction) // 4
        taken = sum(_wavefronts(addresses[8 * m : 8 * m + 8], 16) for m in range(matrices))
    stored = bytes_of_lane(instruction) * int(lanes.sum()) if instruction.name in ("STG", "ST") else 0
    return Step(instruction, base.pipe, taken, base.latency, count, stored)


def access(instruction: Instruction, addresses: Lanes, active: Lanes, moved: Lanes) -> Step:
    """The step of an instruction for memory whose active lanes have these addresses; those in `moved` read
    or write global memory."""
    if active.any():
        first = addresses[active].min()
        addresses = addresses - (first // np.uint64(128)) * np.uint64(128)
    return _access(instruction, addresses.tobytes(), active.tobytes(), moved.tobytes())


@dataclass(frozen=True)
class Timing:
    """What a simulation took."""

    cycles: int
    issued: int  # instructions
    busy: Counter[str]  # cycles of each pipe, on average over the schedulers

    @property
    def per_cycle(self) -> float:
        """Instructions issued a cycle, 4 at most."""
        return self.issued / self.cycles if self.cycles else 0.0


class _Warp:
    """Where a warp stands."""

    def __init__(self, steps: Sequence[Step], block: int) -> None:
        self.steps = steps
        self.block = block
        self.next = 0
        self.ready = 0  # the first cycle in which it can issue again
        self.scoreboards: list[list[int]] = [[] for _ in range(6)]  # cycles of releases to come
        self.copies = 0  # the cycle in which all of its copies have arrived
        self.at_barrier = False

    @property
    def done(self) -> bool:
        return self.next >= len(self.steps)

    def released(self, waits: int) -> int:
        """The first cycle in which all scoreboards of the mask are released."""
        result = 0
        for n in range(6):
            if waits >> n & 1 and self.scoreboards[n]:
                result = max(result, max(self.scoreboards[n]))
        return result

    def start(self) -> int:
        """The first cycle in which the next instruction can issue, its pipe apart."""
        instruction = self.steps[self.next].instruction
        result = max(self.ready, self.released(instruction.control.waits))
        if instruction.name == "DEPBAR" and len(instruction.operands) > 1:  # DEPBAR.LE SB0, newest
            board = self.scoreboards[int(instruction.operands[0].removeprefix("SB"))]
            older = sorted(board)[: len(board) - int(instruction.operands[1], 16)]
            result = max([result, *older])
        return result


def simulate(warps: Iterable[Iterable[Step]], blocks: Sequence[int] | None = None) -> Timing:
    """Runs the warps of one multiprocessor to their ends. blocks[n] is the block of warp n, by default one
    block for all; a barrier joins the warps of a block. Warp n is on scheduler n modulo 4."""
    listed = [list(steps) for steps in warps]
    state = [_Warp(steps, blocks[n] if blocks else 0) for n, steps in enumerate(listed)]
    schedulers = [state[n::SCHEDULERS] for n in range(SCHEDULERS)]
    newest = [0] * SCHEDULERS  # whose warp issued last: warps take turns
    pipes: dict[tuple[str, int], float] = {}  # the cycle in which a pipe is free
    busy: Counter[str] = Counter()
    l2_free, now, finish, issued = 0.0, 0, 0, 0
    left = sum(not warp.done for warp in state)
    while left:
        soonest = 1 << 60
        for s, own in enumerate(schedulers):
            for k in range(len(own)):
                at = (newest[s] + 1 + k) % len(own)
                warp = own[at]
                if warp.done or warp.at_barrier:
                    continue
                if warp.ready > now:
                    soonest = min(soonest, warp.ready)
                    continue
                item = warp.steps[warp.next]
                key = (item.pipe, -1 if item.pipe == MEMORY else s)
                free = pipes.get(key, 0) - (QUEUE if item.pipe == MEMORY else 0)
                start = max(warp.start(), int(free) + (free > int(free)))
                if start > now:
                    soonest = min(soonest, start)
                    continue
                break
            else:
                continue
            soonest = now + 1
            newest[s] = at
            control = item.instruction.control
            begin: float = max(pipes.get(key, 0), now)
            pipes[key] = begin + item.cycles
            busy[item.pipe] += item.cycles
            end: float = begin + item.cycles + item.latency
            if item.l2_bytes:
                l2_free = max(l2_free, begin) + item.l2_bytes / L2_BYTES
                busy["l2"] += item.l2_bytes / L2_BYTES
                end = max(end, l2_free + item.latency)
            if item.instruction.name == "LDGSTS":
                warp.copies = max(warp.copies, int(end))
            if item.instruction.name == "LDGDEPBAR":
                end = warp.copies
            if control.writes != NO_BARRIER:
                _release(warp.scoreboards[control.writes], int(end), now)
            if control.reads != NO_BARRIER:
                _release(warp.scoreboards[control.reads], int(begin) + item.cycles + OPERANDS_READ, now)
            warp.ready = now + max(control.stall, 1)
            warp.next += 1
            issued += 1
            finish = now
            left -= warp.done
            if item.instruction.name == "BAR":
                warp.at_barrier = True
            if item.instruction.name == "BAR" or warp.done:
                _open_barrier([x for x in state if x.block == warp.block], now)
        now = max(now + 1, min(soonest, 1 << 59))
        if soonest >= 1 << 60 and left:
            raise RuntimeError("the warps wait for one another at a barrier that some never reach")
    for pipe in busy:
        if pipe not in (MEMORY, "l2"):
            busy[pipe] = round(busy[pipe] / SCHEDULERS)
    return Timing(finish + 1, issued, busy)


def _release(board: list[int], cycle: int, now: int) -> None:
    board[:] = [x for x in board if x > now]
    board.append(cycle)


def _open_barrier(block: Sequence[_Warp], now: int) -> None:
    """Lets the warps of a block go on if all that still run have arrived."""
    if not all(warp.at_barrier or warp.done for warp in block):
        return
    for warp in block:
        if warp.at_barrier:
            warp.at_barrier = False
            warp.ready = max(warp.ready, now + BARRIER_LATENCY)
