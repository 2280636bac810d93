"""How many blocks of a kernel are resident on one multiprocessor of sm_90, and what of it limits them.

Each of its four parts has 16,384 registers, of which a warp takes a multiple of 256, and room for 16 warps.
Shared memory is 228 KiB, of which each block takes 1 KiB more than it uses (CUDA C++ programming guide).
"""

from benchmarks.gpu.sass import Usage

MULTIPROCESSORS = 132
PARTS = 4
_REGISTERS, _WARPS, _BLOCKS = 16384, 16, 32
_SHARED = 228 << 10


def resident_blocks(usage: Usage, warps: int, dynamic_shared: int) -> int:
    """`usage.shared` has the 1 KiB of the system, as cuobjdump prints it."""
    registers = -(-usage.registers * 32 // 256) * 256
    in_registers = PARTS * min(_REGISTERS // registers, _WARPS) // warps
    return min(in_registers, _SHARED // (usage.shared + dynamic_shared), _BLOCKS)
