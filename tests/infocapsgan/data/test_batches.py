import pytest
import torch

from infocapsgan.data.batches import Batches


def test_an_epoch_is_a_permutation():
    batches = Batches(10, 5, seed=0)
    epoch = torch.cat([batches.indices(0), batches.indices(1)])
    assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(epoch, torch.cat([batches.indices(2), batches.indices(3)]))


def test_the_incomplete_batch_is_left_out():
    batches = Batches(10, 4, seed=0)
    assert batches.per_epoch == 2
    assert [len(batches.indices(step)) for step in range(4)] == [4] * 4


def test_a_step_depends_on_its_number_and_the_seed_alone():
    forward, backward = Batches(10, 3, seed=1), Batches(10, 3, seed=1)
    wanted = [forward.indices(step) for step in range(9)]
    for step in reversed(range(9)):
        assert torch.equal(backward.indices(step), wanted[step])
    assert not torch.equal(Batches(10, 3, seed=0).indices(3), Batches(10, 3, seed=1).indices(0))


@pytest.mark.parametrize("size", [0, 11])
def test_a_size_that_does_not_fit(size):
    with pytest.raises(ValueError, match=f"--batch-size: got {size}, takes 1 to 10"):
        Batches(10, size, seed=0)
