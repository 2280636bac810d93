"""The machine code of a CUDA kernel, as cuobjdump prints it: instructions with their control bits.

Since Volta the compiler writes into each instruction what the hardware needs to schedule it: how many cycles
the warp pauses after it, the scoreboard that a slow instruction sets when its result or its operands are
done with, and the scoreboards that it waits for before it starts.
"""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

NO_BARRIER = 7
_STEP = 16  # bytes of an instruction

_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/\s*\n\s*/\* 0x([0-9a-f]{16}) \*/", re.M
)
_GUARD = re.compile(r"@(!?U?P(?:\d|T))\s+")
_FUNCTION = re.compile(r"^\s*Function : (\S+)\s*$", re.M)


@dataclass(frozen=True)
class Control:
    """The scheduling part of an instruction."""

    stall: int = 1  # cycles until the warp's next instruction
    writes: int = NO_BARRIER  # the scoreboard that is released when the result is there
    reads: int = NO_BARRIER  # the scoreboard that is released when the operands are read
    waits: int = 0  # a bit for each scoreboard that must be released first

    @classmethod
    def decode(cls, word: int) -> "Control":
        """From the upper 64 bits of an instruction."""
        bits = word >> 41
        return cls(bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63)


@dataclass(frozen=True, eq=False)  # one place in the code: none equals another
class Instruction:
    """`@guard opcode operands` at an address."""

    address: int
    guard: str  # such as "P0" or "!P0", empty if there is none
    opcode: str  # with its modifiers, such as "LDS.64"
    operands: tuple[str, ...]
    control: Control = Control()

    @cached_property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @cached_property
    def modifiers(self) -> tuple[str, ...]:
        return tuple(self.opcode.split(".")[1:])

    @property
    def next(self) -> int:
        return self.address + _STEP

    @cached_property
    def target(self) -> int:
        """The address in the last operand: where a branch goes, or where BSSY's region ends."""
        return int(self.operands[-1], 16)

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{self.address:#06x} {guard}{self.opcode} {', '.join(self.operands)}"


@dataclass(frozen=True)
class Function:
    """One kernel of a cubin."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def index(self) -> dict[int, int]:
        """The position of each address."""
        return {instruction.address: n for n, instruction in enumerate(self.instructions)}


@dataclass(frozen=True)
class Usage:
    """What a kernel takes."""

    registers: int  # of a thread
    stack: int  # bytes of a thread
    shared: int  # bytes of a block that the code itself declares, with what the system reserves
    parameters: int  # bytes


def parse_instruction(address: int, text: str, control: Control = Control()) -> Instruction:
    guard = _GUARD.match(text)
    body = text[guard.end() :] if guard else text
    opcode, _, operands = body.partition(" ")
    names = tuple(x.strip() for x in operands.split(",")) if operands.strip() else ()
    return Instruction(address, guard[1] if guard else "", opcode, names, control)


def parse(text: str) -> dict[str, Function]:
    """All functions in what `cuobjdump -sass` prints, by name."""
    parts = _FUNCTION.split(text)
    return {
        name: Function(
            name,
            tuple(
                parse_instruction(int(address, 16), body, Control.decode(int(high, 16)))
                for address, body, _, high in _LINE.findall(code)
            ),
        )
        for name, code in zip(parts[1::2], parts[2::2], strict=True)
    }


def cuobjdump() -> Path | str:
    """The tool of the CUDA toolkit: the one that Triton carries, else the one on the path."""
    try:
        import triton
    except ImportError:
        return "cuobjdump"
    carried = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return carried if carried.exists() else "cuobjdump"


def _printed(option: str, cubin: Path) -> str:
    command = [cuobjdump(), option, cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(cubin: Path) -> dict[str, Function]:
    return parse(_printed("-sass", cubin))


_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:\d+ CONSTANT\[0\]:(\d+)")
_FIRST_PARAMETER = 0x210  # in constant bank 0, on sm_90


def usages(cubin: Path) -> dict[str, Usage]:
    def rows() -> Iterator[tuple[str, Usage]]:
        for name, *numbers in _USAGE.findall(_printed("-res-usage", cubin)):
            registers, stack, shared, constants = map(int, numbers)
            yield name, Usage(registers, stack, shared, constants - _FIRST_PARAMETER)

    return dict(rows())


def spills(function: Function) -> int:
    """Loads and stores of registers that had to go to local memory."""
    return sum(instruction.name in ("LDL", "STL") for instruction in function.instructions)
