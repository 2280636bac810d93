"""Machine code is parsed, and its loops are those of the source."""

from pathlib import Path

from benchmarks.gpu import flow, operands, sass

TINY = sass.parse((Path(__file__).parent / "sass/tiny.sass").read_text())["tiny"]


def at(address: int) -> sass.Instruction:
    return TINY.instructions[TINY.index[address]]


def instruction(text: str) -> sass.Instruction:
    return sass.parse_instruction(0, text)


def test_an_instruction_is_divided_into_its_parts() -> None:
    x = instruction("@!P2 LOP3.LUT R2, RZ, R3, RZ, 0x33, !PT")
    assert (x.guard, x.opcode, x.name, x.modifiers) == ("!P2", "LOP3.LUT", "LOP3", ("LUT",))
    assert x.operands == ("R2", "RZ", "R3", "RZ", "0x33", "!PT")


def test_control_bits() -> None:
    load, use = at(0x3D0), at(0x410)  # LDS R0, and the FFMA that waits for it
    assert load.opcode == "LDS"
    assert load.control.writes != sass.NO_BARRIER
    assert use.control.waits >> load.control.writes & 1
    assert use.control.writes == sass.NO_BARRIER
    assert at(0x420).control.stall >= 1


def test_every_instruction_is_there() -> None:
    addresses = [x.address for x in TINY.instructions]
    assert addresses == list(range(0, 0x4B0, 16))
    assert sass.spills(TINY) == 0


def test_spills_are_counted() -> None:
    spilling = sass.Function("x", (instruction("STL [R1], R2"), instruction("LDL R2, [R1]")))
    assert sass.spills(spilling) == 2


def test_loops_nest_as_in_the_source() -> None:
    control = flow.Flow(TINY)
    nested = [(TINY.instructions[x.head].address, x.depth) for x in control.nested()]
    assert nested == [(0x240, 0), (0x360, 0), (0x3D0, 1)]
    copying, outer, inner = control.nested()
    assert inner.parent is outer
    assert [flow.purpose(control.all(x)) for x in (copying, inner)] == ["loads", "sums from shared memory"]
    assert flow.kinds(control.all(inner)) == {"LDS": 1, "UIADD3": 2, "ISETP": 1, "FFMA": 1, "BRA": 1}
    assert flow.kinds(control.own(outer))["FFMA"] == 0
    assert [x.address for x in control.turn(inner)] == list(range(0x3D0, 0x430, 16))


def test_what_is_read_and_written() -> None:
    def registers(mask: int) -> set[int]:
        return {n for n in range(256) if mask >> n & 1}

    wide = instruction("IMAD.WIDE.U32 R2, R13, 0x4, R6")
    assert registers(operands.writes(wide)) == {2, 3}
    assert registers(operands.reads(wide)) == {13, 6, 7}
    load = instruction("LDS.128 R4, [R8+0x10]")
    assert registers(operands.writes(load)) == {4, 5, 6, 7}
    assert registers(operands.address_reads(instruction("STG.E desc[UR8][R2.64+0x4], R9"))) == {2, 3}
    carries = instruction("IADD3 R4, P0, R2, -R3, RZ")
    assert operands.destinations(carries) == 2
    assert operands.destinations(instruction("SEL R4, R2, R3, P0")) == 1
    assert operands.destinations(instruction("SHFL.BFLY PT, R4, R2, 0x1, 0x1f")) == 2


def test_only_what_steers_is_computed() -> None:
    steers = dict(zip((x.address for x in TINY.instructions), operands.steering(TINY), strict=True))
    assert steers[0xF0]  # of the division that gives the number of rows
    assert steers[0x3F0]  # the address of a load
    assert not steers[0x410]  # the sum
    assert not steers[0x430]  # a predicate that guards an addition only
