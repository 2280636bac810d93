"""The cycle model on cases that can be counted by hand."""

import numpy as np
import pytest

from benchmarks.gpu import cycles, sass
from benchmarks.gpu.occupancy import resident_blocks
from benchmarks.gpu.sass import Control


def step(text: str, **control: int) -> cycles.Step:
    return cycles.step(sass.parse_instruction(0, text, Control(**control)))


FFMA = "FFMA R0, R1, R2, R0"
LDS = "LDS R0, [R1]"
BAR = "BAR.SYNC.DEFER_BLOCKING 0x0"


def test_a_warp_issues_one_instruction_a_cycle() -> None:
    timing = cycles.simulate([[step(FFMA)] * 10])
    assert (timing.cycles, timing.issued) == (10, 10)


def test_the_compilers_pauses_count() -> None:
    assert cycles.simulate([[step(FFMA, stall=4)] * 10]).cycles == 9 * 4 + 1


def test_another_warp_of_the_scheduler_fills_the_pauses() -> None:
    warp, nothing = [step(FFMA, stall=4)] * 10, []
    shared = cycles.simulate([warp, nothing, nothing, nothing, warp])
    assert shared.cycles == 9 * 4 + 2
    assert shared.per_cycle == pytest.approx(20 / 38)


def test_four_schedulers_issue_at_the_same_time() -> None:
    assert cycles.simulate([[step(FFMA)] * 10] * 4).cycles == 10
    assert cycles.simulate([[step(FFMA)] * 10] * 8).cycles == 20


@pytest.mark.parametrize(
    ("text", "each"),
    [("IADD3 R0, R1, R2, RZ", 2), ("MUFU.EX2 R0, R1", 8), ("HMMA.1688.F32.TF32 R0, R4, R8, R0", 6)],
)
def test_a_pipe_is_taken_for_its_cycles(text: str, each: int) -> None:
    assert cycles.simulate([[step(text)] * 10]).cycles == 9 * each + 1


def test_an_instruction_waits_for_the_scoreboard_of_a_load() -> None:
    timing = cycles.simulate([[step(LDS, writes=2), step(FFMA, waits=1 << 2)]])
    assert timing.cycles == 1 + cycles.SHARED_LATENCY + 1
    assert cycles.simulate([[step(LDS, writes=2), step(FFMA, waits=1 << 1)]]).cycles == 2


def test_shared_memory_serves_one_warp_a_cycle_for_all_schedulers() -> None:
    timing = cycles.simulate([[step("LDS.128 R0, [R4]")] * 10] * 4)
    assert timing.cycles == pytest.approx(4 * 40, abs=8)


def test_a_barrier_joins_the_warps_of_a_block_only() -> None:
    slow, fast = [step(FFMA, stall=15)] * 10 + [step(BAR)], [step(BAR)]
    after = [step(FFMA)]
    joined = cycles.simulate([slow + after, fast + after])
    assert joined.cycles == 150 + cycles.BARRIER_LATENCY + 1
    apart = cycles.simulate([slow, fast + after * 5], blocks=[0, 1])
    assert apart.cycles == 151


def test_a_warp_that_has_ended_keeps_none_at_a_barrier() -> None:
    assert cycles.simulate([[step(FFMA)] * 30, [step(BAR), step(FFMA)]]).cycles < 60


def test_a_wait_for_copies_leaves_the_newest_groups() -> None:
    copy = [step("LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64]"), step("LDGDEPBAR", writes=0)]

    def waiting(newest: int) -> int:
        pause = [step("NOP", stall=15)] * 10
        wait = step(f"DEPBAR.LE SB0, {newest:#x}")
        return cycles.simulate([copy + pause + copy + [wait]]).cycles

    assert waiting(0) - waiting(1) == 152  # the pause and two instructions
    assert waiting(0) > 154 + cycles.L2_LATENCY
    assert waiting(2) < 170


def test_the_second_level_cache_has_a_rate() -> None:
    load = step("LDG.E.128 R0, desc[UR4][R2.64]", writes=0)
    timing = cycles.simulate([[load] * 100 + [step(FFMA, waits=1)]])
    assert timing.cycles == pytest.approx(100 * 512 / cycles.L2_BYTES + cycles.L2_LATENCY, rel=0.02)


@pytest.mark.parametrize(
    ("text", "distance", "wavefronts"),
    [
        ("LDS R0, [R1]", 4, 1),
        ("LDS R0, [R1]", 8, 2),
        ("LDS R0, [R1]", 128, 32),
        ("LDS R0, [R1]", 0, 1),
        ("LDS.64 R0, [R2]", 8, 2),
        ("LDS.128 R0, [R4]", 16, 4),
        ("LDS.128 R0, [R4]", 32, 8),
        ("LDSM.16.M88.4 R0, [R4]", 16, 4),
        ("LDSM.16.M88.4 R0, [R4]", 128, 32),
        ("STS [R1], R0", 4, 1),
    ],
)
def test_bank_conflicts(text: str, distance: int, wavefronts: int) -> None:
    addresses, every = np.arange(32, dtype=np.uint64) * np.uint64(distance), np.ones(32, bool)
    x = sass.parse_instruction(0, text)
    assert cycles.access(x, addresses + np.uint64(1024), every, every).cycles == wavefronts


@pytest.mark.parametrize(
    ("registers", "warps", "dynamic", "blocks"),
    [
        (128, 10, 106624, 1),  # 16 warps in registers
        (128, 8, 106624, 2),
        (128, 8, 120000, 1),  # shared memory
        (255, 8, 1000, 1),
        (168, 4, 1000, 3),
        (32, 8, 0, 8),  # 64 warps
        (16, 1, 0, 32),
    ],
)
def test_resident_blocks(registers: int, warps: int, dynamic: int, blocks: int) -> None:
    assert resident_blocks(sass.Usage(registers, 0, 1024, 0), warps, dynamic) == blocks
