"""The emulator detects faults: each kernel with a known fault is compared with the same kernel without it."""

import pytest
import torch
from torch import Tensor

from tests.cuda_emulator.emulated import Emulated


def run(
    emulated: Emulated, name: str, size: int, threads: int, correct: bool, **options: int | bool
) -> Tensor:
    """The output of the kernel for 0, 1, 2, …, from one block or from `blocks` in a cooperative launch.

    The kernel's `n` defaults to `size`.
    """
    blocks, n = options.pop("blocks", 1), options.pop("n", size)
    emulated.device.set(**options)
    emulated.at_end = not options.get("backwards", False)
    try:
        numbers = emulated.guarded(torch.arange(size, dtype=torch.float32))
        out = emulated._empty((size,), torch.float32)
        emulated.device.run_fault(name, numbers.data_ptr(), out.data_ptr(), n, blocks, threads, correct)
        return out.clone()
    finally:
        emulated.device.check_and_free()


@pytest.mark.parametrize(("name", "size", "blocks"), [("reverse", 64, 1), ("neighbours", 3, 3)])
def test_missing_barrier(emulated: Emulated, name: str, size: int, blocks: int) -> None:
    threads = 32 if blocks > 1 else size
    correct, faulty = (
        [
            run(emulated, name, size, threads, is_correct, blocks=blocks, backwards=backwards)
            for backwards in (False, True)
        ]
        for is_correct in (True, False)
    )
    expected = torch.arange(size).flip(0) if name == "reverse" else torch.tensor([2, 1, 3])
    assert torch.equal(correct[0], expected.float())
    assert torch.equal(correct[0], correct[1])
    assert not torch.equal(faulty[0], faulty[1])


def test_read_outside_an_allocation(emulated: Emulated) -> None:
    """Beyond the end of a tensor that fills 16-byte units, a read is an error; of any other it gives NaN."""
    assert run(emulated, "shift", 32, 64, True)[-1] == 0
    with pytest.raises(RuntimeError, match="shift: access outside an allocation, by thread 31 of block 0"):
        run(emulated, "shift", 32, 64, False)
    assert run(emulated, "shift", 33, 64, False)[-1].isnan()


def test_write_outside_an_allocation(emulated: Emulated) -> None:
    run(emulated, "reverse", 64, 64, True)
    with pytest.raises(RuntimeError, match="access outside an allocation"):
        run(emulated, "reverse", 60, 64, True)
    with pytest.raises(RuntimeError, match="wrote outside an allocation"):
        run(emulated, "reverse", 31, 32, True)


def test_write_outside_shared_memory(emulated: Emulated) -> None:
    run(emulated, "shared_overrun", 64, 64, True)
    with pytest.raises(RuntimeError, match="shared_overrun: access outside an allocation, by thread 63"):
        run(emulated, "shared_overrun", 64, 64, False)


def test_fragment_layout(emulated: Emulated) -> None:
    numbers = torch.arange(128.0).view(16, 8)
    expected = numbers @ numbers[:8].T
    assert torch.equal(run(emulated, "product", 128, 32, True).view(16, 8), expected)
    assert not torch.equal(run(emulated, "product", 128, 32, False).view(16, 8), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fragment_layouts_of_16_bit(emulated: Emulated, dtype: str) -> None:
    """Depth 16, depth 8, and operands transposed while they are loaded; all numbers are exact."""
    numbers = torch.arange(512.0)[:256].view(16, 16)
    expected = [numbers @ numbers[:8].T, numbers[:, :8] @ numbers[:8, :8].T, numbers.T @ numbers[:, :8]]
    correct, faulty = (
        run(emulated, f"products_{dtype}", 512, 128, is_correct)[:384].view(3, 16, 8)
        for is_correct in (True, False)
    )
    for n in range(3):
        assert torch.equal(correct[n], expected[n])
        assert not torch.equal(faulty[n], expected[n])


def test_barrier_that_not_all_reach(emulated: Emulated) -> None:
    assert run(emulated, "deserted", 64, 64, True).eq(1).all()
    with pytest.raises(RuntimeError, match="threads wait at a barrier that the others never reach"):
        run(emulated, "deserted", 64, 64, False)


def test_lanes_in_different_instructions(emulated: Emulated) -> None:
    assert run(emulated, "divergent", 32, 32, True)[0] == 1
    with pytest.raises(RuntimeError, match="lanes of one warp meet in shuffle_xor and in shuffle"):
        run(emulated, "divergent", 32, 32, False)


def test_wait_that_is_missing(emulated: Emulated) -> None:
    """A copy that is executed when it begins hides the fault. One that is executed late reveals it as NaN."""
    numbers = torch.arange(32.0)
    for late in (False, True):
        assert torch.equal(run(emulated, "late_wait", 32, 32, True, late_copies=late), numbers)
    assert torch.equal(run(emulated, "late_wait", 32, 32, False), numbers)
    assert run(emulated, "late_wait", 32, 32, False, late_copies=True).isnan().all()


def test_copies_that_nothing_waits_for(emulated: Emulated) -> None:
    run(emulated, "forgotten_wait", 32, 32, True, late_copies=True)
    run(emulated, "forgotten_wait", 32, 32, False)
    with pytest.raises(RuntimeError, match="a thread ends before it has waited for its copies"):
        run(emulated, "forgotten_wait", 32, 32, False, late_copies=True)


@pytest.mark.parametrize("newest", range(9))
def test_groups_of_copies(emulated: Emulated, newest: int) -> None:
    """As in PTX, wait_group waits for all groups that have ended except the newest, never for an open one."""
    early = run(emulated, "groups", 64, 64, True, n=newest)[:9]
    numbers = torch.tensor([0, 0, 8, 0, 16, 0, 24, 0, 32.0])  # every second copy is one of zeros
    assert torch.equal(early, numbers)
    late = run(emulated, "groups", 64, 64, True, n=newest, late_copies=True)[:9]
    arrived = 8 - newest if 1 <= newest <= 7 else 9
    assert torch.equal(late[:arrived], numbers[:arrived])
    assert late[arrived:].isnan().all()


def test_limits_of_a_launch(emulated: Emulated) -> None:
    with pytest.raises(RuntimeError, match="cannot launch 1 blocks of 2048 threads"):
        run(emulated, "reverse", 2048, 2048, True)
    with pytest.raises(RuntimeError, match="256 bytes of shared memory"):
        run(emulated, "reverse", 64, 64, True, shared_per_block=128)
    with pytest.raises(RuntimeError, match="too many blocks for a cooperative launch"):
        run(emulated, "neighbours", 4, 32, True, blocks=4)
    with pytest.raises(RuntimeError, match="too many blocks for a cooperative launch"):
        run(emulated, "neighbours", 3, 32, True, blocks=3, cooperative=False)
