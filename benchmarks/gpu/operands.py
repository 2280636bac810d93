"""Which registers and predicates an instruction reads and writes, and which instructions steer a kernel."""

import re
from collections.abc import Iterator
from functools import cache

from benchmarks.gpu.sass import Function, Instruction

# Bits of a set of registers: R0 ... R255, UR0 ... UR63, P0 ... P6, UP0 ... UP6. RZ, URZ, PT and UPT are
# constants.
_UNIFORM, _PREDICATES, _UNIFORM_PREDICATES = 256, 320, 328
_REGISTER = re.compile(r"\b(U?)([RP])(\d+)")
_PREDICATE = re.compile(r"!?U?P(\d|T)$")
BRANCHES = ("BRA", "EXIT", "RET", "CALL", "BREAK", "BRX", "BSSY", "BSYNC", "JMP")
LOADS = ("LDS", "LDSM", "LDG", "LD", "LDL")
STORES = ("STS", "STSM", "STG", "ST", "STL", "RED")
COPIES = ("LDGSTS",)
MEMORY = (*LOADS, *STORES, *COPIES)
_NOTHING = (
    *STORES,
    *COPIES,
    *BRANCHES,
    "BAR",
    "DEPBAR",
    "NOP",
    "WARPSYNC",
    "YIELD",
    "MEMBAR",
    "ERRBAR",
    "BPT",
)
_SETS_TWO = ("ISETP", "FSETP", "PLOP3", "UISETP", "UPLOP3", "DSETP", "HSETP2", "UFSETP")


def is_predicate(operand: str) -> bool:
    return bool(_PREDICATE.match(operand))


@cache
def destinations(instruction: Instruction) -> int:
    """How many of the first operands are written."""
    if instruction.name in _NOTHING or not instruction.operands:
        return 0
    if instruction.name in _SETS_TWO:
        return 2
    first, *rest = instruction.operands
    if is_predicate(first):
        return 1 if instruction.name == "FCHK" else 2
    carries = 0  # IADD3 R4, P0, R2, R3, RZ
    while carries < len(rest) - 1 and is_predicate(rest[carries]) and not rest[carries].startswith("!"):
        carries += 1
    return 1 + carries


def width(instruction: Instruction) -> int:
    """How many registers the result takes."""
    name, modifiers = instruction.name, instruction.modifiers
    if name in ("HMMA", "IMMA"):
        return 4
    if name == "LDSM":
        return int(modifiers[-1]) if modifiers[-1].isdigit() else 1
    if "128" in modifiers and name in (*LOADS, "LDC", "ULDC"):
        return 4
    if "WIDE" in modifiers or (name in ("LDC", "ULDC", *LOADS) and "64" in modifiers):
        return 2
    if name == "F2I" and ("U64" in modifiers or "S64" in modifiers):
        return 2
    return 2 if name == "CS2R" and "32" not in modifiers else 1


def _source_width(instruction: Instruction, operand: int) -> int:
    name, modifiers = instruction.name, instruction.modifiers
    if name in ("IMAD", "UIMAD") and ("WIDE" in modifiers or "HI" in modifiers):
        return 2 if operand == destinations(instruction) + 2 else 1
    if name == "STS" and operand == len(instruction.operands) - 1:
        return 4 if "128" in modifiers else 2 if "64" in modifiers else 1
    wide = name == "RET" or (name in ("I2F", "F2F", "F2I") and ("U64" in modifiers or "S64" in modifiers))
    return 2 if wide else 1


def _bits(operand: str, count: int) -> Iterator[int]:
    for uniform, kind, number in _REGISTER.findall(operand):
        base = (
            (_UNIFORM if uniform else 0) if kind == "R" else _UNIFORM_PREDICATES if uniform else _PREDICATES
        )
        pair = 2 if f"R{number}.64" in operand else count
        yield from (1 << base + int(number) + k for k in range(pair if kind == "R" else 1))
    if operand == "PR":
        yield from (1 << _PREDICATES + k for k in range(7))


@cache
def reads(instruction: Instruction) -> int:
    """The set of what it reads, the guard included."""
    result = sum(set(_bits(instruction.guard, 1)))
    for n in range(destinations(instruction), len(instruction.operands)):
        for bit in _bits(instruction.operands[n], _source_width(instruction, n)):
            result |= bit
    return result


@cache
def address_reads(instruction: Instruction) -> int:
    """Of an instruction for memory: what its guard and its addresses read."""
    result = sum(set(_bits(instruction.guard, 1)))
    for operand in instruction.operands:
        if "[" in operand or is_predicate(operand):  # LDGSTS has a predicate as an operand
            for bit in _bits(operand, 1):
                result |= bit
    return result


@cache
def writes(instruction: Instruction) -> int:
    """The set of what it writes."""
    result = 0
    for n in range(destinations(instruction)):
        for bit in _bits(instruction.operands[n], width(instruction)):
            result |= bit
    return result


def _followers(function: Function) -> list[list[int]]:
    """For each instruction those that may come next, calls and returns included."""
    code = function.instructions
    returns: dict[int, list[int]] = {}  # of each subroutine, by its first address
    for n, x in enumerate(code):
        if x.name == "CALL":
            returns.setdefault(x.target, []).append(n + 1)
    result = []
    for n, x in enumerate(code):
        after = [n + 1] if n + 1 < len(code) else []
        if x.name in ("BRA", "CALL", "JMP") and x.target in function.index:
            conditional = x.guard or len(x.operands) > 1
            result.append([function.index[x.target], *(after if conditional else [])])
        elif x.name == "RET":  # subroutines stand one behind the other
            subroutine = max((target for target in returns if target <= x.address), default=-1)
            result.append([*returns.get(subroutine, ()), *(after if x.guard else [])])
        elif x.name in ("EXIT", "BPT"):
            result.append(after if x.guard else [])
        else:
            result.append(after)
    return result


def steering(function: Function) -> list[bool]:
    """Of each instruction whether a branch, or an address of memory, depends on its result.

    The others needn't be computed to know which instructions a warp executes and how it accesses memory.
    """
    code, followers = function.instructions, _followers(function)
    before: list[list[int]] = [[] for _ in code]
    for n, following in enumerate(followers):
        for m in following:
            before[m].append(n)
    wanted = [0] * len(code)  # before each instruction: what is needed of the registers
    needed = [False] * len(code)
    todo = list(range(len(code)))  # the last one is taken first: against the flow
    waiting = set(todo)
    while todo:
        n = todo.pop()
        waiting.discard(n)
        x = code[n]
        after = 0
        for m in followers[n]:
            after |= wanted[m]
        result = after
        if x.name in MEMORY:
            # A word in shared memory may come back and steer.
            result |= reads(x) if x.name == "STS" else address_reads(x)
        elif x.name in BRANCHES or x.name == "BAR":
            result |= reads(x)
        if writes(x) & after:
            needed[n] = True
            # A guarded instruction leaves the old value where the guard is false.
            result = (result if x.guard else result & ~writes(x)) | (
                address_reads(x) if x.name in MEMORY else reads(x)
            )
        if result != wanted[n]:
            wanted[n] = result
            for m in before[n]:
                if m not in waiting:
                    waiting.add(m)
                    todo.append(m)
    return needed
