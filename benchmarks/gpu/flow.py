"""The control flow of a kernel: basic blocks, and natural loops with their nesting and what they contain."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from benchmarks.gpu.sass import Function, Instruction

_ENDS = ("BRA", "EXIT", "RET", "BRX", "JMP", "JMX", "CALL", "BREAK", "BPT")


_ENTRY = -1  # an empty block before the kernel and its subroutines


@dataclass(frozen=True)
class Block:
    """Instructions first ... last of the function, which run one after the other."""

    first: int
    last: int
    successors: tuple[int, ...]  # the first instructions of the blocks that may follow


@dataclass
class Loop:
    """A natural loop: the blocks from which its head is reached again without leaving it."""

    head: int  # index of its first instruction
    body: frozenset[int]  # the blocks, by their first instructions
    parent: "Loop | None" = field(default=None, repr=False)

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else self.parent.depth + 1


def _always(instruction: Instruction) -> bool:
    """Whether no lane of an active warp skips it."""
    return instruction.guard in ("", "PT", "UPT")


def successors(function: Function, n: int) -> tuple[int, ...]:
    """Indices of the instructions that may follow instruction n.

    A call is followed by what comes after it; the subroutine has a flow of its own.
    BRA.DIV is for warps whose lanes have diverged, which the compiler could not exclude; it isn't taken.
    """
    instruction = function.instructions[n]
    after = (n + 1,) if n + 1 < len(function.instructions) else ()
    if instruction.name in ("EXIT", "RET", "BPT"):
        return () if _always(instruction) else after
    if instruction.opcode == "BRA.DIV" or instruction.name not in ("BRA", "JMP"):
        return after
    target = function.index.get(instruction.target)
    targets = () if target is None else (target,)
    # A branch has a predicate as its first operand too, such as `@P0 BRA P1, 0x80` or `BRA.U UP0, 0x80`.
    conditional = not _always(instruction) or len(instruction.operands) > 1
    return (*after, *targets) if conditional else targets


class Flow:
    """Blocks and loops of one function."""

    def __init__(self, function: Function) -> None:
        self.function = function
        code = function.instructions
        leaders = {0}
        for n, instruction in enumerate(code):
            if instruction.name in _ENDS:
                leaders.add(n + 1)
                leaders.update(successors(function, n))
            if instruction.name in ("BSSY", "CALL") and instruction.target in function.index:
                leaders.add(function.index[instruction.target])
        starts = sorted(n for n in leaders if n < len(code))
        ends = [n - 1 for n in starts[1:]] + [len(code) - 1]
        self.blocks = {
            first: Block(first, last, successors(function, last))
            for first, last in zip(starts, ends, strict=True)
        }
        calls = {function.index[x.target] for x in code if x.name == "CALL"}
        self.blocks[_ENTRY] = Block(_ENTRY, _ENTRY - 1, (0, *sorted(calls)))

    @cached_property
    def order(self) -> list[int]:
        """The blocks that can be reached from the entry, each before those that follow it (but for loops)."""
        done: list[int] = []
        seen, stack = {_ENTRY}, [(_ENTRY, iter(self.blocks[_ENTRY].successors))]
        while stack:
            block, rest = stack[-1]
            following = next((n for n in rest if n not in seen), None)
            if following is None:
                done.append(block)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.blocks[following].successors)))
        return done[::-1]

    @cached_property
    def predecessors(self) -> dict[int, list[int]]:
        result: dict[int, list[int]] = {n: [] for n in self.order}
        for n in self.order:
            for following in self.blocks[n].successors:
                result[following].append(n)
        return result

    @cached_property
    def dominators(self) -> dict[int, int]:
        """The immediate dominator of each block (Cooper, Harvey, Kennedy: a simple, fast algorithm)."""
        rank = {n: k for k, n in enumerate(self.order)}
        above = {_ENTRY: _ENTRY}

        def common(a: int, b: int) -> int:
            while a != b:
                while rank[a] > rank[b]:
                    a = above[a]
                while rank[b] > rank[a]:
                    b = above[b]
            return a

        changed = True
        while changed:
            changed = False
            for n in self.order[1:]:
                known = [p for p in self.predecessors[n] if p in above]
                new = known[0]
                for p in known[1:]:
                    new = common(p, new)
                if above.get(n) != new:
                    above[n], changed = new, True
        return above

    def dominates(self, a: int, b: int) -> bool:
        while b not in (a, _ENTRY):
            b = self.dominators[b]
        return a == b

    @cached_property
    def loops(self) -> list[Loop]:
        """All natural loops, outer ones before those inside them; those with one head are one loop."""
        bodies: dict[int, set[int]] = {}
        for n in self.order:
            for head in self.blocks[n].successors:
                if self.dominates(head, n):
                    bodies.setdefault(head, {head}).update(self._reaching(n, head))
        loops = [Loop(head, frozenset(body)) for head, body in bodies.items()]
        loops.sort(key=lambda loop: (-len(loop.body), loop.head))
        for k, loop in enumerate(loops):
            around = [outer for outer in loops[:k] if loop.head in outer.body and outer.head != loop.head]
            loop.parent = min(around, key=lambda outer: len(outer.body), default=None)
        return loops

    def _reaching(self, tail: int, head: int) -> set[int]:
        body, stack = {head, tail}, [tail]
        while stack:
            n = stack.pop()
            if n == head:
                continue
            for p in self.predecessors[n]:
                if p not in body:
                    body.add(p)
                    stack.append(p)
        return body

    def nested(self) -> list[Loop]:
        """The loops in the order of the code, each followed by those inside it."""

        def below(parent: Loop | None) -> Iterator[Loop]:
            for loop in sorted((x for x in self.loops if x.parent is parent), key=lambda x: x.head):
                yield loop
                yield from below(loop)

        return list(below(None))

    def innermost(self, loop: Loop) -> bool:
        return not any(inner.parent is loop for inner in self.loops)

    def own(self, loop: Loop) -> list[Instruction]:
        """The instructions of a loop that are in no loop inside it."""
        inner = [x.body for x in self.loops if x.parent is loop]
        blocks = sorted(n for n in loop.body if not any(n in body for body in inner))
        return [x for n in blocks for x in self.code(n)]

    def all(self, loop: Loop) -> list[Instruction]:
        return [x for n in sorted(loop.body) for x in self.code(n)]

    def code(self, block: int) -> Sequence[Instruction]:
        return self.function.instructions[block : self.blocks[block].last + 1]

    def turn(self, loop: Loop) -> list[Instruction]:
        """One turn of an innermost loop along its likely path.

        That is the way round the loop with the most instructions that passes no block twice and stays in the
        loop, without the out-of-line code that the compiler put after the loop's end.
        """
        last = max(
            (self.blocks[n].last for n in loop.body if loop.head in self.blocks[n].successors), default=0
        )
        path: list[Instruction] = []
        n = loop.head
        seen: set[int] = set()
        while n not in seen:
            seen.add(n)
            path.extend(self.code(n))
            inside = [x for x in self.blocks[n].successors if x in loop.body and x <= last]
            ahead = [x for x in inside if x not in seen]
            if not ahead:
                break
            n = min(ahead)  # the nearest, which skips nothing
        return path


def kinds(instructions: Sequence[Instruction]) -> Counter[str]:
    """How many instructions of each name."""
    return Counter(instruction.name for instruction in instructions)


# What a loop is for, by the first of these that it contains.
_PURPOSES = (
    ("matrix products", ("HMMA", "HGMMA")),
    ("copies", ("LDGSTS", "UBLKCP", "UTMALDG")),
    ("exponentials", ("MUFU",)),
    ("loads", ("LDG",)),
    ("stores", ("STG",)),
    ("sums from shared memory", ("LDS", "LDSM")),
    ("shared memory", ("STS",)),
)


def purpose(instructions: Sequence[Instruction]) -> str:
    names = kinds(instructions)
    for title, wanted in _PURPOSES:
        if any(names[name] for name in wanted):
            return title
    return "other"
