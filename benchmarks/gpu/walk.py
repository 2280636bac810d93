"""Walks a warp through the machine code of a launch: which instructions it executes, in which order.

The way is computed as the hardware would, lane by lane, from the launch's parameters: trip counts, branches
and addresses are those of the real call. Only what numbers in memory are is not known: every load gives 1.0,
in float32, but for words that the warp itself wrote to shared memory. So a warp does not depend on others,
and barriers need no attention here. Instructions on which neither a branch nor an address depends are not
computed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from benchmarks.gpu import arithmetic, cycles
from benchmarks.gpu.arithmetic import LANES, Lanes, State
from benchmarks.gpu.operands import COPIES, LOADS, MEMORY, destinations, is_predicate, steering, width
from benchmarks.gpu.sass import Function, Instruction

_FIRST_PARAMETER = 0x210  # in constant bank 0
_PARAMETERS = 1 << 39  # a made-up address of the parameters in memory
_LIMIT = 3_000_000  # instructions of a warp: it does not end
# Their results are not computed but taken as 1.0: loads, products of matrices, numbers of 16 bit.
_OPAQUE = (
    *("HMMA", "HGMMA", "HADD2", "HMUL2", "HFMA2", "HMNMX2", "F2FP", "F2F", "MOVM"),
    *(*LOADS, "ATOM", "ATOMG", "ATOMS"),
)


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel."""

    name: str
    blocks: int
    threads: int  # of a block
    shared: int  # dynamic shared memory of a block, in bytes
    parameters: bytes
    cluster: int = 1  # blocks
    rows: int = 1  # of the grid, each with blocks / rows of them

    @property
    def warps(self) -> int:
        return -(-self.threads // LANES)

    def constants(self) -> bytes:
        """Bank 0: the sizes of block, grid and cluster, the stack, and the parameters."""
        words = {0x0: self.threads, 0x4: 1, 0x8: 1, 0xC: self.blocks // self.rows, 0x10: self.rows, 0x14: 1}
        words[0x150] = int(np.float32(1 / self.cluster).view(np.uint32))
        words[0x15C] = self.blocks // self.cluster
        head = bytearray(_FIRST_PARAMETER)
        for at, value in words.items():
            head[at : at + 4] = value.to_bytes(4, "little")
        head[0x198:0x1A0] = _PARAMETERS.to_bytes(8, "little")  # where a pointer to the parameters points
        return bytes(head) + self.parameters

    def special(self, block: int, warp: int) -> dict[str, Lanes]:
        """The special registers of a warp; those that aren't here are 0."""
        lane = np.arange(LANES, dtype=np.uint64)

        def same(n: int) -> Lanes:
            return np.full(LANES, n, np.uint64)

        rank = block % self.cluster
        return {
            "SR_TID.X": lane + np.uint64(warp * LANES),
            "SR_LANEID": lane,
            "SR_CTAID.X": same(block % (self.blocks // self.rows)),
            "SR_CTAID.Y": same(block // (self.blocks // self.rows)),
            "SR_CgaCtaId": same(rank),
            "SR_CTA_RANK_IN_CLUSTER": same(rank),
        }


def _registers(first: str, count: int) -> list[str]:
    """A register and those after it; the zero register is all of them."""
    return [first if first == "RZ" else f"R{int(first[1:]) + n}" for n in range(count)]


class _Region:
    """The lanes that meet again at a BSYNC."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes.copy()


@dataclass(eq=False)
class _Group:
    """Lanes that are at the same place."""

    at: int  # the next instruction
    lanes: Lanes
    regions: dict[str, _Region] = field(default_factory=dict)
    waits: _Region | None = None


class Walk:
    """The walks through one function; what depends on the function only is prepared once."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.steers = steering(function)
        plain = [cycles.step(x) for x in function.instructions]
        self.steps = plain
        self.actions: list[Callable[..., object] | None] = [
            self._action(x, steers) for x, steers in zip(function.instructions, self.steers, strict=True)
        ]

    def trace(self, launch: Launch, block: int, warp: int) -> list[cycles.Step]:
        """The steps of one warp, with the bank conflicts of its addresses."""
        state = State(launch.constants(), launch.special(block, warp))
        active = np.arange(LANES) + warp * LANES < launch.threads
        return _Run(self, state, active).run()

    def _action(self, x: Instruction, steers: bool) -> Callable[..., object] | None:
        name = x.name
        if name in _FLOW and x.opcode != "BRA.DIV":
            return _FLOW[name]
        if name in MEMORY:
            return _Run.access
        if not steers:
            return None
        constant = x.opcode == "HFMA2.MMA" and x.operands[1:3] == ("-RZ", "RZ")
        return _Run.opaque if name in _OPAQUE and not constant else _Run.compute


class _Run:
    """One walk."""

    def __init__(self, walk: Walk, state: State, active: Lanes) -> None:
        self.walk, self.state = walk, state
        self.code, self.index = walk.function.instructions, walk.function.index
        self.words: dict[int, int] = {}  # of shared memory, which this warp wrote
        self.groups = [_Group(0, active)]
        self.group = self.groups[0]

    def run(self) -> list[cycles.Step]:
        steps: list[cycles.Step] = []
        plain, actions, code = self.walk.steps, self.walk.actions, self.code
        while self.groups:
            ready = [group for group in self.groups if group.waits is None]
            if not ready:
                raise RuntimeError(f"{self.walk.function.name}: lanes wait for others that never come")
            self.group = group = min(ready, key=lambda x: x.at)  # those behind first
            others = [x.at for x in ready if x is not group]
            nearest = min(others, default=len(code))
            if nearest == group.at:
                self._join(next(x for x in ready if x is not group and x.at == group.at))
                continue
            while True:
                at = group.at
                group.at = at + 1
                action = actions[at]
                if action is None:
                    steps.append(plain[at])
                    continue
                result = action(self, code[at], plain[at])
                steps.append(result if isinstance(result, cycles.Step) else plain[at])
                if result is True or group.at >= nearest:  # other lanes may be next
                    break
            if len(steps) > _LIMIT:
                raise RuntimeError(f"{self.walk.function.name}: a warp does not come to its end")
        return steps

    def _join(self, other: _Group) -> None:
        self.group.lanes = self.group.lanes | other.lanes
        self.groups.remove(other)

    def _guarded(self, x: Instruction) -> Lanes:
        """The lanes for which the guard of the current instruction is true."""
        lanes = self.group.lanes
        return lanes & self.state.predicate(x.guard) if x.guard else lanes

    def compute(self, x: Instruction, plain: cycles.Step) -> None:
        arithmetic.compute(self.state, x, self._guarded(x))

    def opaque(self, x: Instruction, plain: cycles.Step) -> None:
        lanes = self._guarded(x)
        first = next((o for o in x.operands[: destinations(x)] if not is_predicate(o)), "RZ")
        if first in ("RZ", "URZ"):
            return
        kind = "UR" if first[0] == "U" else "R"
        for n in range(width(x)):
            self.state.set(f"{kind}{int(first[len(kind) :]) + n}", arithmetic.ONE, lanes)

    def access(self, x: Instruction, plain: cycles.Step) -> cycles.Step:
        """A step with the cycles that its addresses cost, and the bytes that it moves."""
        lanes = self._guarded(x)
        *_, place = (o for o in x.operands if "[" in o)
        loads = x.name in LOADS and self.walk.steers[self.index[x.address]]
        if x.name == "STS":
            self._store_words(x, self.state.address(place), lanes)
        if loads and x.name == "LDS" and self._load_words(x, self.state.address(place), lanes):
            loads = False
        if loads and not (x.name == "LD" and self._load_parameter(x, self.state.address(place), lanes)):
            self.opaque(x, plain)
        if x.name in COPIES:  # a false predicate writes zeros instead of copying
            flag = x.operands[-1] if is_predicate(x.operands[-1]) else ""
            copied = lanes & ~self.state.predicate(flag) if flag else lanes
            return cycles.access(x, self.state.address(place), lanes, copied)
        return cycles.access(x, self.state.address(place), lanes, lanes)

    def _store_words(self, x: Instruction, addresses: Lanes, lanes: Lanes) -> None:
        for n, register in enumerate(_registers(x.operands[-1], cycles.bytes_of_lane(x) // 4)):
            values = self.state.word(register)
            for lane in np.flatnonzero(lanes):
                self.words[int(addresses[lane]) + 4 * n] = int(values[lane])

    def _load_words(self, x: Instruction, addresses: Lanes, lanes: Lanes) -> bool:
        """Whether all lanes read words that this warp wrote."""
        own = np.flatnonzero(lanes)
        for n, register in enumerate(_registers(x.operands[0], cycles.bytes_of_lane(x) // 4)):
            words = [self.words.get(int(addresses[lane]) + 4 * n) for lane in own]
            if not words or None in words:
                return False
            values = np.zeros(LANES, np.uint64)
            values[own] = words
            self.state.set(register, values, lanes)
        return True

    def _load_parameter(self, x: Instruction, addresses: Lanes, lanes: Lanes) -> bool:
        """Whether it was a load of one of the launch's parameters by its address."""
        constants = self.state.constants
        at = int(addresses[lanes.argmax()]) - _PARAMETERS
        if not lanes.any() or not 0 <= at < len(constants) - _FIRST_PARAMETER:
            return False
        size = cycles.bytes_of_lane(x)
        at += _FIRST_PARAMETER
        value = int.from_bytes(constants[at : at + size], "little")
        store = self.state.set_pair if size == 8 else self.state.set
        store(x.operands[0], np.full(LANES, value, np.uint64), lanes)
        return True

    # What changes the way. They return True where other lanes may have to go first.

    def branch(self, x: Instruction, plain: cycles.Step) -> bool:
        lanes = self._guarded(x)
        if len(x.operands) > 1:
            lanes = lanes & self.state.predicate(x.operands[0])
        return self._divide(lanes, self.index[x.target])

    def _divide(self, lanes: Lanes, target: int) -> bool:
        group = self.group
        if not lanes.any():
            return False
        if (lanes == group.lanes).all():
            group.at = target
            return len(self.groups) > 1
        self.groups.append(_Group(target, lanes.copy(), dict(group.regions)))
        group.lanes = group.lanes & ~lanes
        return True

    def exit(self, x: Instruction, plain: cycles.Step) -> bool:
        lanes = self._guarded(x)
        if not lanes.any():
            return False
        self._leave(lanes, [region for group in self.groups for region in group.regions.values()])
        self.group.lanes = self.group.lanes & ~lanes
        if not self.group.lanes.any():
            self.groups.remove(self.group)
        self._release()
        return True

    def call(self, x: Instruction, plain: cycles.Step) -> bool:
        return self._divide(self._guarded(x), self.index[x.target])

    def come_back(self, x: Instruction, plain: cycles.Step) -> bool:
        """RET.REL.NODEC R6 0x0: to the address in R6."""
        lanes = self._guarded(x)
        if not lanes.any():
            return False
        to = {int(n) for n in self.state.word(x.operands[0].split()[0])[lanes]}
        if len(to) != 1:
            raise RuntimeError(f"lanes return to different places: {x}")
        return self._divide(lanes, self.index[to.pop()])

    def region(self, x: Instruction, plain: cycles.Step) -> None:
        self.group.regions[x.operands[0]] = _Region(self.group.lanes)

    def synchronize(self, x: Instruction, plain: cycles.Step) -> bool:
        region = self.group.regions.get(x.operands[0])
        if region is None or not (region.lanes & ~self.group.lanes).any():
            return False
        self.group.waits = region
        self._release()
        return True

    def leave_region(self, x: Instruction, plain: cycles.Step) -> None:
        region = self.group.regions.get(x.operands[0])
        if region is not None:
            self._leave(self._guarded(x), [region])
            self._release()

    @staticmethod
    def _leave(lanes: Lanes, regions: list[_Region]) -> None:
        for region in regions:
            region.lanes = region.lanes & ~lanes

    def _release(self) -> None:
        """Joins the groups whose region is complete."""
        for region in {id(group.waits): group.waits for group in self.groups if group.waits}.values():
            waiting = [group for group in self.groups if group.waits is region]
            arrived = np.logical_or.reduce([group.lanes for group in waiting])
            if (region.lanes & ~arrived).any():
                continue
            for other in waiting[1:]:
                self.groups.remove(other)
            waiting[0].lanes, waiting[0].waits = arrived, None


_FLOW: Mapping[str, Callable[..., object]] = {
    "BRA": _Run.branch,
    "EXIT": _Run.exit,
    "CALL": _Run.call,
    "RET": _Run.come_back,
    "BSSY": _Run.region,
    "BSYNC": _Run.synchronize,
    "BREAK": _Run.leave_region,
}
