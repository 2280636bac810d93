"""Walks take the way that the hardware would."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu import arithmetic, sass
from benchmarks.gpu.walk import Launch, Walk

TINY = sass.parse((Path(__file__).parent / "sass/tiny.sass").read_text())["tiny"]
LANES = np.arange(32, dtype=np.uint64)


def launch(n: int, m: int, threads: int = 32) -> Launch:
    """Of tiny(x, y, n, m)."""
    words = (0x7F00000000, 8), (0x7F10000000, 8), (n, 4), (m, 4)
    return Launch("tiny", 1, threads, 4096, b"".join(x.to_bytes(size, "little") for x, size in words))


@pytest.mark.parametrize(("n", "m"), [(70, 7), (71, 7), (1000, 3), (5, 5), (64, 1)])
def test_trip_counts_are_those_of_the_parameters(n: int, m: int) -> None:
    rows = n // m
    steps = Walk(TINY).trace(launch(n, m), 0, 0)
    turns = Counter(step.instruction.address for step in steps)
    assert turns[0x410] == rows * m  # the sum
    assert turns[0x250] == -(-rows // 32)  # loads, by 32 lanes
    assert steps[-1].instruction.name == "EXIT"


def test_a_branch_that_no_lane_takes() -> None:
    turns = Counter(step.instruction.opcode for step in Walk(TINY).trace(launch(3, 7), 0, 0))
    assert turns["FFMA"] == turns["STS"] == 0


def test_bank_conflicts_come_from_the_addresses() -> None:
    steps = Walk(TINY).trace(launch(320, 10), 0, 0)
    stores = {step.cycles for step in steps if step.instruction.name == "STS"}  # to s[2 i]
    loads = {step.cycles for step in steps if step.instruction.name == "LDS"}  # of one number
    assert (stores, loads) == ({2}, {1})


def test_bytes_come_from_the_active_lanes() -> None:
    steps = Walk(TINY).trace(launch(40, 10), 0, 0)
    assert [step.l2_bytes for step in steps if step.instruction.name == "LDG"] == [32]  # 4 lanes
    assert sum(step.stored for step in steps) == 128


DIVERGENT = """
S2R R0, SR_LANEID
MOV R1, RZ
BSSY B0, 0x80
VIADD R1, R1, 0x1
ISETP.GT.AND P0, PT, R1, R0, PT
@P0 BRA 0x70
BRA 0x30
BSYNC B0
FADD R2, R2, R2
EXIT
"""


def function(text: str) -> sass.Function:
    lines = text.strip().splitlines()
    return sass.Function("x", tuple(sass.parse_instruction(16 * n, x) for n, x in enumerate(lines)))


def test_lanes_that_leave_a_loop_at_different_times_meet_again() -> None:
    steps = Walk(function(DIVERGENT)).trace(launch(0, 1), 0, 0)
    opcodes = Counter(step.instruction.opcode for step in steps)
    assert opcodes["VIADD"] == 32  # the longest way, once for all
    assert opcodes["FADD"] == 1


def test_an_unknown_instruction_is_named_where_the_way_depends_on_it() -> None:
    code = function("STRANGE R0, R1\nISETP.GT.AND P0, PT, R0, RZ, PT\n@P0 BRA 0x30\nEXIT")
    with pytest.raises(arithmetic.UnknownInstructionError, match="STRANGE"):
        Walk(code).trace(launch(0, 1), 0, 0)
    assert len(Walk(function("STRANGE R0, R1\nEXIT")).trace(launch(0, 1), 0, 0)) == 2


def computed(text: str, **registers: int) -> int:
    """What an instruction leaves in R0, or in P0, if its inputs are the same in all lanes."""
    state = arithmetic.State(bytes(0x400), {})
    for name, value in registers.items():
        if name[0] == "P":
            state.predicates["P"][int(name[1:])] = bool(value)
        else:
            state.registers["R"][int(name[1:])] = value & 0xFFFFFFFF
    x = sass.parse_instruction(0, text)
    arithmetic.compute(state, x, np.ones(32, bool))
    return int(state.predicates["P"][0][0]) if x.operands[0] == "P0" else int(state.registers["R"][0][0])


@pytest.mark.parametrize(
    ("text", "registers", "expected"),
    [
        ("IMAD R0, R1, R2, R3", {"R1": 7, "R2": -3, "R3": 1}, -20),
        ("IMAD.HI.U32 R0, R1, R2, R4", {"R1": 1 << 31, "R2": 6, "R4": 0, "R5": 1}, 4),
        ("IMAD.MOV R0, RZ, RZ, -R1", {"R1": 5}, -5),
        ("IADD3 R0, R1, -R2, 0x10", {"R1": 5, "R2": 7}, 14),
        ("IADD3.X R0, R1, R2, RZ, P0, !PT", {"R1": 5, "R2": 7, "P0": 1}, 13),
        ("LEA R0, R1, R2, 0x3", {"R1": 5, "R2": 2}, 42),
        ("LEA.HI R0, R1, R2, RZ, 0x5", {"R1": 0xF8000000, "R2": 1}, 32),
        ("LEA.HI.SX32 R0, R1, R2, 0x1b", {"R1": -64, "R2": 10}, 8),
        ("LOP3.LUT R0, R1, 0x3, RZ, 0xc0, !PT", {"R1": 0xFE}, 2),
        ("LOP3.LUT R0, RZ, R1, RZ, 0x33, !PT", {"R1": 5}, -6),
        ("SHF.R.S32.HI R0, RZ, 0x4, R1", {"R1": -32}, -2),
        ("SHF.R.U32.HI R0, RZ, 0x4, R1", {"R1": 0x80000000}, 0x08000000),
        ("SHF.L.U32 R0, R1, 0x1f, RZ", {"R1": 3}, 0x80000000),
        ("SHF.L.U64.HI R0, R1, 0x2, R2", {"R1": 0xC0000000, "R2": 1}, 7),
        ("VIMNMX R0, R1, R2, PT", {"R1": -5, "R2": 3}, -5),
        ("VIMNMX R0, R1, R2, !PT", {"R1": -5, "R2": 3}, 3),
        ("VIADDMNMX R0, R1, 0xffffffff, R2, PT", {"R1": 4, "R2": 9}, 3),
        ("PRMT R0, R1, 0x9910, RZ", {"R1": 0x8001}, 0xFFFF8001),
        ("SEL R0, R1, R2, !P0", {"R1": 1, "R2": 2, "P0": 1}, 2),
        ("ISETP.GE.U32.AND P0, PT, R1, R2, PT", {"R1": -1, "R2": 1}, 1),
        ("ISETP.GE.AND P0, PT, R1, R2, PT", {"R1": -1, "R2": 1}, 0),
        ("ISETP.GE.AND.EX P0, PT, R1, R2, PT, P1", {"R1": 3, "R2": 3, "P1": 1}, 1),
        ("ISETP.NE.OR P0, PT, R1, RZ, P1", {"R1": 0, "P1": 1}, 1),
        ("PLOP3.LUT P0, PT, P1, P2, PT, 0xa8, 0x0", {"P1": 1, "P2": 0}, 1),
        ("SGXT R0, R1, 0x1", {"R1": 3}, -1),
        ("SGXT.U32 R0, R1, 0x4", {"R1": 0x1F}, 15),
        ("IABS R0, R1", {"R1": -9}, 9),
        ("POPC R0, R1", {"R1": 0xFF}, 8),
        ("F2I.FTZ.U32.TRUNC.NTZ R0, R1", {"R1": 0x40F00000}, 7),
        ("I2F.U32.RP R0, R1", {"R1": 16777217}, 0x4B800001),
        ("FADD R0, R1, -1", {"R1": 0x40000000}, 0x3F800000),
        ("HFMA2.MMA R0, -RZ, RZ, 1, 0", {}, 0x3C000000),
    ],
)
def test_arithmetic(text: str, registers: dict[str, int], expected: int) -> None:
    assert computed(text, **registers) == expected & 0xFFFFFFFF


@pytest.mark.parametrize(("a", "b"), [(100, 7), (2**31 - 1, 3), (12345678, 1152), (5, 9)])
def test_division(a: int, b: int) -> None:
    """By the sequence of instructions that the compiler writes for it: a / b turns of a loop."""
    state = arithmetic.State(launch(a, b).constants(), {})
    for x in TINY.instructions[: TINY.index[0x1D0]]:
        if x.name not in ("BSSY", "S2R"):
            lanes = state.predicate(x.guard) if x.guard else np.ones(32, bool)
            arithmetic.compute(state, x, lanes)
    assert int(state.registers["R"][2][0]) == a // b
