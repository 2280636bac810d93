"""What instructions compute, for the 32 lanes of a warp at a time: those that steer a kernel.

Values are the bits of registers, numpy arrays of 32 numbers in uint64, so that carries and 64-bit products
fit. Only what kernels use to choose their way and their addresses is here.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.gpu.operands import destinations, is_predicate
from benchmarks.gpu.sass import Instruction

Lanes = npt.NDArray[Any]
LANES = 32
MASK = np.uint64(0xFFFFFFFF)
_SIGN = np.uint64(1 << 31)
_32 = np.uint64(32)
ONE = np.full(LANES, 0x3F800000, np.uint64)  # the bits of 1.0


class UnknownInstructionError(Exception):
    """A kernel's way depends on an instruction whose meaning is not in arithmetic.py."""


def signed(x: Lanes) -> npt.NDArray[np.int64]:
    return (x ^ _SIGN).astype(np.int64) - (1 << 31)


def bits(x: Lanes) -> Lanes:
    """Back from signed numbers."""
    return x.astype(np.int64).astype(np.uint64) & MASK


def as_float(x: Lanes) -> npt.NDArray[np.float32]:
    return x.astype(np.uint32).view(np.float32)


def float_bits(x: Any) -> Lanes:
    with np.errstate(over="ignore"):
        single = np.asarray(x, np.float32)
    return single.view(np.uint32).astype(np.uint64)


_ZERO = np.zeros(LANES, np.uint64)
_1 = np.uint64(1)
_NUMBER = re.compile(r"-?(0x[0-9a-f]+|\d+)$")
_FLOATS = {"+INF": np.inf, "-INF": -np.inf, "+QNAN": np.nan, "-QNAN": np.nan, "QNAN": np.nan}


@cache
def _register(name: str) -> tuple[str, int]:
    """Its kind and its number; no kind for one that is always 0."""
    if name in ("RZ", "URZ"):
        return "", 0
    kind = "UR" if name[0] == "U" else "R"
    return kind, int(name[len(kind) :])


@cache
def _immediate(operand: str) -> Lanes:
    return np.full(LANES, int(operand, 16 if "x" in operand else 10) & 0xFFFFFFFF, np.uint64)


@cache
def _signed_name(operand: str) -> tuple[str, str]:
    """The sign "-" or "~" of an integer operand, and what it applies to."""
    operand = operand.partition(".reuse")[0]
    if _NUMBER.match(operand) or operand[0] not in "-~":
        return "", operand
    return operand[0], operand[1:].strip("|")


class State:
    """Registers and predicates of a warp, and the constants of a launch."""

    def __init__(self, constants: bytes, special: dict[str, Lanes]) -> None:
        self.constants = constants  # bank 0
        self.special = special
        self._known: dict[tuple[str, int], Lanes] = {}  # constants that were read before
        self.registers = {
            "R": np.zeros((256, LANES), np.uint64),
            "UR": np.zeros((64, LANES), np.uint64),
        }
        self.predicates = {"P": np.zeros((8, LANES), bool), "UP": np.zeros((8, LANES), bool)}
        self.predicates["P"][7] = self.predicates["UP"][7] = True

    def predicate(self, operand: str) -> Lanes:
        name = operand.lstrip("!")
        kind, number = ("UP", name[2:]) if name[0] == "U" else ("P", name[1:])
        value = self.predicates[kind][7 if number == "T" else int(number)]
        return ~value if operand[0] == "!" else value

    def constant(self, operand: str, size: int) -> Lanes:
        """c[0x0][0x210], or c[0x0][R4+0x210]."""
        known = self._known.get((operand, size))
        if known is not None:
            return known
        bank, index = re.findall(r"\[([^\]]*)\]", operand)
        at = np.zeros(LANES, np.int64)
        for part in index.split("+"):
            if part == "RZ":
                continue
            at = at + (int(part, 16) if part.startswith("0x") else signed(self.register(part)))
        if int(bank, 16) != 0:
            return np.zeros(LANES, np.uint64)
        whole = self.constants
        if (at == at[0]).all():
            chunk = whole[int(at[0]) : int(at[0]) + size]
            value = np.full(LANES, int.from_bytes(chunk, "little"), np.uint64)
            if "R" not in index:
                self._known[operand, size] = value
            return value
        numbers = [int.from_bytes(whole[int(n) : int(n) + size], "little") for n in at]
        return np.array(numbers, np.uint64)

    def register(self, name: str) -> Lanes:
        kind, number = _register(name)
        return self.registers[kind][number] if kind else _ZERO

    def _plain(self, operand: str) -> Lanes:
        if operand.startswith("c["):
            return self.constant(operand, 4)
        return self.register(operand) if "R" in operand else _immediate(operand)

    def word(self, operand: str) -> Lanes:
        """An integer operand, with its sign; -x as its two's complement, modulo 2^32."""
        sign, name = _signed_name(operand)
        return self._plain(name) if not sign else self.carrying(operand) & MASK

    def carrying(self, operand: str) -> Lanes:
        """The same as ~x + 1 without losing the bit that it may carry: as an adder sees it."""
        sign, name = _signed_name(operand)
        value = self._plain(name)
        if not sign:
            return value
        return (~value & MASK) + _1 if sign == "-" else ~value & MASK

    def pair(self, operand: str) -> Lanes:
        """A 64-bit integer in two registers, or a constant of 64 bits."""
        operand = operand.partition(".reuse")[0].removesuffix(".64")
        if operand.startswith("c["):
            return self.constant(operand, 8)
        if "R" not in operand:
            return np.full(LANES, int(operand, 16) & (1 << 64) - 1, np.uint64)
        kind, n = _register(operand)
        if not kind:
            return _ZERO
        return self.registers[kind][n] | self.registers[kind][n + 1] << _32

    def number(self, operand: str) -> npt.NDArray[np.float32]:
        """A float32 operand."""
        operand = operand.partition(".reuse")[0]
        negative = operand[0] == "-" and operand not in _FLOATS
        inner = operand[1:] if negative else operand
        absolute = inner[0] == "|"
        inner = inner.strip("|")
        if inner in _FLOATS:
            value = np.full(LANES, _FLOATS[inner], np.float32)
        elif "R" in inner or inner.startswith("c["):
            value = as_float(self._plain(inner))
        else:
            value = np.full(LANES, float(inner), np.float32)
        value = abs(value) if absolute else value
        return -value if negative else value

    def address(self, operand: str) -> Lanes:
        """[R10.64+0x4], [R4+UR6+-0x8], desc[UR4][R10.64]."""
        inside = operand.rpartition("[")[2].rstrip("]")
        total = np.zeros(LANES, np.uint64)
        for part in inside.replace("+-", "+\0").split("+"):
            if part.startswith("\0"):
                total = total - np.uint64(int(part[1:], 16))
            elif part.startswith("0x"):
                total = total + np.uint64(int(part, 16))
            elif part.endswith(".64"):
                total = total + self.pair(part)
            else:
                name = re.sub(r"\.(U32|X\d+|reuse)", "", part)
                total = total + self.register(name)
        return total

    def set(self, operand: str, value: Lanes, active: Lanes) -> None:
        kind, number = _register(operand)
        if kind:
            np.copyto(self.registers[kind][number], value & MASK, where=active)

    def set_pair(self, operand: str, value: Lanes, active: Lanes) -> None:
        kind, n = _register(operand)
        if not kind:
            return
        np.copyto(self.registers[kind][n], value & MASK, where=active)
        np.copyto(self.registers[kind][n + 1], value >> _32, where=active)

    def set_predicate(self, operand: str, value: Lanes, active: Lanes) -> None:
        kind = "UP" if operand[0] == "U" else "P"
        if not operand.endswith("T"):
            np.copyto(self.predicates[kind][int(operand[len(kind) :])], value, where=active)


_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}
_UNORDERED = {"LTU": "GE", "LEU": "GT", "GTU": "LE", "GEU": "LT", "NEU": "EQ", "EQU": "NE"}  # negated


def _table(lut: int, a: Lanes, b: Lanes, c: Lanes, ones: Any) -> Lanes:
    """The logical function whose value for the bits a, b, c is bit 4 a + 2 b + c of `lut`."""
    result = a & ~a
    for n in range(8):
        if lut >> n & 1:
            result = result | (
                (a if n & 4 else ones ^ a) & (b if n & 2 else ones ^ b) & (c if n & 1 else ones ^ c)
            )
    return result


def _compare(state: State, x: Instruction, active: Lanes) -> None:
    """ISETP.GE.U32.AND P0, PT, a, b, combined-with[, lower words compared]; FSETP."""
    relation = x.modifiers[0]
    if x.name.endswith("FSETP"):
        a, b = state.number(x.operands[2]), state.number(x.operands[3])
        negated = relation in _UNORDERED
        result = _COMPARISONS[_UNORDERED.get(relation, relation)](a, b)
        result = ~result if negated else result
    else:
        a, b = state.word(x.operands[2]), state.word(x.operands[3])
        if "U32" not in x.modifiers:
            a, b = signed(a), signed(b)
        result = _COMPARISONS[relation](a, b)
        if "EX" in x.modifiers:
            lower, equal = state.predicate(x.operands[5]), np.equal(a, b)
            result = (result & ~equal) | (equal & lower)
    other = state.predicate(x.operands[4])
    values = []
    for value in (result, ~result):
        combined = value & other if "AND" in x.modifiers else value | other
        values.append(value ^ other if "XOR" in x.modifiers else combined)
    state.set_predicate(x.operands[0], values[0], active)
    state.set_predicate(x.operands[1], values[1], active)


def _with_carry(state: State, x: Instruction, total: Lanes, active: Lanes) -> None:
    """Stores a sum in the first operand and what it carries in the predicates after it."""
    state.set(x.operands[0], total, active)
    for n in range(1, destinations(x)):
        state.set_predicate(x.operands[n], (total >> _32) >= n, active)


def _add(state: State, x: Instruction, active: Lanes) -> None:
    sources = x.operands[destinations(x) :]
    total = sum(
        (
            state.predicate(operand).astype(np.uint64) if is_predicate(operand) else state.carrying(operand)
            for operand in sources
        ),
        np.zeros(LANES, np.uint64),
    )
    _with_carry(state, x, total, active)


def _multiply_add(state: State, x: Instruction, active: Lanes) -> None:
    a, b, c, *carry = x.operands[destinations(x) :]
    unsigned = "U32" in x.modifiers
    if "WIDE" in x.modifiers or "HI" in x.modifiers:
        left, right = state.word(a), state.word(b)
        if not unsigned:
            left, right = (signed(n).astype(np.uint64) for n in (left, right))
        total = left * right + state.pair(c)
        if "WIDE" in x.modifiers:
            state.set_pair(x.operands[0], total, active)
        else:
            state.set(x.operands[0], total >> _32, active)
        return
    total = state.word(a) * state.word(b) + state.carrying(c)
    for operand in carry:
        total = total + state.predicate(operand).astype(np.uint64)
    state.set(x.operands[0], total, active)


def _shift_add(state: State, x: Instruction, active: Lanes) -> None:
    """LEA: (a << n) + b; LEA.HI: the upper word of (c:a << n), plus b; LEA.HI.X: and a carry."""
    a, b, *rest = x.operands[destinations(x) :]
    carry = [operand for operand in rest if is_predicate(operand)]
    others = [operand for operand in rest if not is_predicate(operand)]
    shift = np.uint64(int(others[-1], 16))
    low = state.word(a)
    if "HI" in x.modifiers:
        sign = signed(low).astype(np.uint64)
        whole = sign if "SX32" in x.modifiers else low | state.word(others[0]) << _32
        part = (whole << shift) >> _32
    else:
        part = (low << shift) & MASK
    total = part + state.carrying(b)
    for operand in carry:
        total = total + state.predicate(operand).astype(np.uint64)
    _with_carry(state, x, total, active)


def _logic(state: State, x: Instruction, active: Lanes) -> None:
    """LOP3.LUT [P0,] R0, a, b, c, lut, !PT"""
    n = destinations(x)
    a, b, c = (state.word(operand) for operand in x.operands[n : n + 3])
    value = _table(int(x.operands[n + 3], 16), a, b, c, MASK)
    state.set(x.operands[n - 1], value, active)
    if n == 2:
        state.set_predicate(x.operands[0], value != 0, active)


def _predicate_logic(state: State, x: Instruction, active: Lanes) -> None:
    a, b, c = (state.predicate(operand) for operand in x.operands[2:5])
    values = [_table(int(lut, 16), a, b, c, True) for lut in x.operands[5:7]]
    for operand, value in zip(x.operands, values, strict=False):
        state.set_predicate(operand, value, active)


def _shift(state: State, x: Instruction, active: Lanes) -> None:
    """SHF.L.U32 R0, low, n, high; SHF.R.S32.HI R0, low, n, high; .U64: of both."""
    low, count, high = (state.word(operand) for operand in x.operands[1:4])
    n = np.minimum(count, np.uint64(63))
    whole = low | high << _32
    upper = "HI" in x.modifiers
    if x.modifiers[0] == "L":
        result = np.where(n < 64, whole << n, 0)
        result = result >> _32 if upper else result
    elif "S32" in x.modifiers or "S64" in x.modifiers:
        shifted = whole.astype(np.int64) >> n.astype(np.int64)
        result = shifted.astype(np.uint64)
        result = result >> _32 if upper else result
    else:
        result = whole >> n
        result = result >> _32 if upper else result
    state.set(x.operands[0], result, active)


def _select(state: State, x: Instruction, active: Lanes) -> None:
    a, b, chosen = x.operands[1:4]
    state.set(x.operands[0], np.where(state.predicate(chosen), _any(state, x, a), _any(state, x, b)), active)


def _any(state: State, x: Instruction, operand: str) -> Lanes:
    return float_bits(state.number(operand)) if x.name.startswith("F") else state.word(operand)


def _extreme(state: State, x: Instruction, active: Lanes) -> None:
    """VIMNMX R0, a, b, P: the smaller where P is true, else the larger; VIADDMNMX: of a + b and c."""
    *numbers, least = x.operands[1:]
    values = [state.word(operand) for operand in numbers]
    if x.name == "VIADDMNMX":
        values = [(values[0] + values[1]) & MASK, values[2]]
    a, b = values if "U32" in x.modifiers else map(signed, values)
    result = np.where(state.predicate(least), np.minimum(a, b), np.maximum(a, b))
    state.set(x.operands[0], bits(result), active)


def _permute(state: State, x: Instruction, active: Lanes) -> None:
    """PRMT R0, a, selector, b: four bytes out of b:a; bit 3 of a digit repeats the byte's sign."""
    low, selector, high = (state.word(operand) for operand in x.operands[1:4])
    whole, result = low | high << _32, np.zeros(LANES, np.uint64)
    for n in range(4):
        digit = selector >> np.uint64(4 * n)
        byte = whole >> ((digit & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
        sign = np.where(byte >= 128, np.uint64(255), np.uint64(0))
        byte = np.where(digit & np.uint64(8), sign, byte)
        result |= byte << np.uint64(8 * n)
    state.set(x.operands[0], result, active)


def _load_constant(state: State, x: Instruction, active: Lanes) -> None:
    to, source = x.operands
    if "64" in x.modifiers:
        state.set_pair(to, state.constant(source, 8), active)
    elif "U8" in x.modifiers or "U16" in x.modifiers:
        state.set(to, state.constant(source, 1 if "U8" in x.modifiers else 2), active)
    else:
        state.set(to, state.constant(source, 4), active)


def _special(state: State, x: Instruction, active: Lanes) -> None:
    value = state.special.get(x.operands[1], np.zeros(LANES, np.uint64))
    state.set(x.operands[0], value, active)
    if x.name == "CS2R" and "32" not in x.modifiers:
        state.set_pair(x.operands[0], value, active)


def _move(state: State, x: Instruction, active: Lanes) -> None:
    state.set(x.operands[0], state.word(x.operands[1]), active)


def _float_constant(state: State, x: Instruction, active: Lanes) -> None:
    """HFMA2.MMA R0, -RZ, RZ, high, low: two halves put together."""
    high, low = (int(np.float16(float(n)).view(np.uint16)) for n in x.operands[3:5])
    state.set(x.operands[0], np.full(LANES, high << 16 | low, np.uint64), active)


def _float(state: State, x: Instruction, active: Lanes) -> None:
    with np.errstate(all="ignore"):
        if x.name == "FMNMX":
            a, b = state.number(x.operands[1]), state.number(x.operands[2])
            value = np.where(state.predicate(x.operands[3]), np.fmin(a, b), np.fmax(a, b))
        else:
            a, b, *c = (state.number(operand) for operand in x.operands[1:])
            exact = a.astype(np.float64)
            value = exact + b if x.name == "FADD" else exact * b + (c[0] if c else 0)
            value = np.clip(value, 0, 1) if "SAT" in x.modifiers else value
        state.set(x.operands[0], float_bits(value), active)


def _function(state: State, x: Instruction, active: Lanes) -> None:
    value = state.number(x.operands[1]).astype(np.float64)
    with np.errstate(all="ignore"):
        result = {
            "RCP": lambda v: 1 / v,
            "RSQ": lambda v: 1 / np.sqrt(v),
            "SQRT": np.sqrt,
            "EX2": np.exp2,
            "LG2": np.log2,
        }[x.modifiers[0]](value)
    state.set(x.operands[0], float_bits(result), active)


def _to_float(state: State, x: Instruction, active: Lanes) -> None:
    """I2F.U32.RP R4, R7: rounded up where RP says so, else to nearest."""
    wide = "U64" in x.modifiers or "S64" in x.modifiers
    source = state.pair(x.operands[1]) if wide else state.word(x.operands[1])
    if not any(m.startswith("U") for m in x.modifiers):
        source = source.astype(np.int64) if wide else signed(source)
    value = source.astype(np.float64)
    result = value.astype(np.float32)
    if "RP" in x.modifiers:
        result = np.where(result < value, np.nextafter(result, np.float32(np.inf)), result)
    state.set(x.operands[0], float_bits(result), active)


def _to_integer(state: State, x: Instruction, active: Lanes) -> None:
    value = np.nan_to_num(np.trunc(state.number(x.operands[1]).astype(np.float64)))
    if "U64" in x.modifiers:
        state.set_pair(x.operands[0], np.clip(value, 0, 2.0**64 - 2048).astype(np.uint64), active)
    elif "U32" in x.modifiers:
        state.set(x.operands[0], np.clip(value, 0, 2**32 - 1).astype(np.uint64), active)
    else:
        state.set(x.operands[0], bits(np.clip(value, -(2**31), 2**31 - 1)), active)


def _exchange(state: State, x: Instruction, active: Lanes) -> None:
    """SHFL.BFLY PT, R0, R1, mask, 0x1f, and IDX; other kinds give a lane its own number."""
    value, lanes = state.word(x.operands[2]), np.arange(LANES, dtype=np.uint64)
    other = state.word(x.operands[3])
    source = {"BFLY": lanes ^ other, "IDX": other}.get(x.modifiers[0], lanes) & np.uint64(31)
    state.set(x.operands[1], value[source.astype(np.int64)], active)
    state.set_predicate(x.operands[0], np.ones(LANES, bool), active)


def _to_predicates(state: State, x: Instruction, active: Lanes) -> None:
    value, mask = state.word(x.operands[1]), int(x.operands[2], 16)
    for n in range(7):
        if mask >> n & 1:
            state.set_predicate(f"P{n}", value >> np.uint64(n) & np.uint64(1) != 0, active)


def _from_predicates(state: State, x: Instruction, active: Lanes) -> None:
    mask, value = int(x.operands[3], 16), state.word(x.operands[2])
    for n in range(7):
        if mask >> n & 1:
            bit = state.predicates["P"][n].astype(np.uint64) << np.uint64(n)
            value = (value & ~np.uint64(1 << n)) | bit
    state.set(x.operands[0], value, active)


def _vote(state: State, x: Instruction, active: Lanes) -> None:
    """VOTEU.ANY UR0, UPT, PT: a bit for each lane where it is true. VOTE.ANY P0, P1: whether one is."""
    true = state.predicate(x.operands[-1]) & active
    every = np.ones(LANES, bool)
    to = [operand for operand in x.operands[: destinations(x)] if not is_predicate(operand)]
    for operand in to:
        state.set(operand, np.full(LANES, sum(1 << n for n in range(LANES) if true[n]), np.uint64), every)
    if is_predicate(x.operands[0]):
        result = true.any() if "ANY" in x.modifiers else true.sum() == active.sum()
        state.set_predicate(x.operands[0], np.full(LANES, result), every)


def _count(state: State, x: Instruction, active: Lanes) -> None:
    value = [int(n) for n in state.word(x.operands[1])]
    if x.name.endswith("POPC"):
        result = [n.bit_count() for n in value]
    else:  # FLO: the position of the highest bit
        result = [n.bit_length() - 1 & 0xFFFFFFFF for n in value]
    state.set(x.operands[0], np.array(result, np.uint64), active)


def _absolute(state: State, x: Instruction, active: Lanes) -> None:
    state.set(x.operands[0], bits(abs(signed(state.word(x.operands[1])))), active)


def _extend(state: State, x: Instruction, active: Lanes) -> None:
    """SGXT R0, a, n: the lower n bits, with their sign unless U32."""
    a, n = state.word(x.operands[1]), state.word(x.operands[2])
    low = a & ((_1 << n) - _1)
    negative = low >> (n - _1) & _1 != 0
    state.set(
        x.operands[0], low if "U32" in x.modifiers else np.where(negative, low - (_1 << n), low), active
    )


def _no_special_case(state: State, x: Instruction, active: Lanes) -> None:
    """FCHK: whether a division needs the slow way."""
    state.set_predicate(x.operands[0], np.zeros(LANES, bool), active)


_MEANINGS: dict[str, Callable[[State, Instruction, Lanes], None]] = {
    **dict.fromkeys(("MOV", "UMOV", "R2UR"), _move),
    **dict.fromkeys(("IADD3", "UIADD3", "VIADD", "IADD"), _add),
    **dict.fromkeys(("IMAD", "UIMAD"), _multiply_add),
    **dict.fromkeys(("LEA", "ULEA"), _shift_add),
    **dict.fromkeys(("LOP3", "ULOP3"), _logic),
    **dict.fromkeys(("PLOP3", "UPLOP3"), _predicate_logic),
    **dict.fromkeys(("SHF", "USHF"), _shift),
    **dict.fromkeys(("SEL", "USEL", "FSEL"), _select),
    **dict.fromkeys(("ISETP", "UISETP", "FSETP"), _compare),
    **dict.fromkeys(("VIMNMX", "IMNMX", "VIADDMNMX"), _extreme),
    **dict.fromkeys(("PRMT", "UPRMT"), _permute),
    **dict.fromkeys(("LDC", "ULDC"), _load_constant),
    **dict.fromkeys(("S2R", "S2UR", "CS2R"), _special),
    **dict.fromkeys(("FADD", "FMUL", "FFMA", "FMNMX"), _float),
    **dict.fromkeys(("VOTE", "VOTEU"), _vote),
    **dict.fromkeys(("POPC", "UPOPC", "FLO", "UFLO"), _count),
    "HFMA2": _float_constant,
    "MUFU": _function,
    "I2F": _to_float,
    "I2FP": _to_float,
    "F2I": _to_integer,
    "SHFL": _exchange,
    "R2P": _to_predicates,
    "P2R": _from_predicates,
    "IABS": _absolute,
    "FCHK": _no_special_case,
    "SGXT": _extend,
    "USGXT": _extend,
}


def compute(state: State, x: Instruction, active: Lanes) -> None:
    """Executes an instruction in the active lanes."""
    meaning = _MEANINGS.get(x.name)
    if meaning is None:
        raise UnknownInstructionError(
            f"arithmetic.py lacks {x.opcode}, on which the way of the kernel depends: {x}"
        )
    meaning(state, x, active)
