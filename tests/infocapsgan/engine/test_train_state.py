import pytest
import torch

from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.train_state import NonFiniteLossError, TrainState


def weight(value):
    return torch.nn.Parameter(torch.tensor([value]))


def test_an_update_changes_the_weights_of_its_optimiser_alone():
    ours, other = weight(1.0), weight(2.0)
    optimizers = {"ours": torch.optim.SGD([ours], 0.1), "other": torch.optim.SGD([other], 0.1)}
    TrainState(optimizers, ShardedGenerator(0)).update("ours", (ours * other).sum())
    assert ours.item() == pytest.approx(0.8)
    assert (other.item(), other.grad) == (2.0, None)


def test_a_weight_that_the_loss_does_not_depend_on_stays():
    used, unused = weight(1.0), weight(2.0)
    TrainState({"all": torch.optim.Adam([used, unused], 0.1)}, ShardedGenerator(0)).update("all", used.sum())
    assert used.item() == pytest.approx(0.9)
    assert unused.item() == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing(value):
    ours = weight(1.0)
    with pytest.raises(NonFiniteLossError, match=f"the loss of ours is {value}"):
        TrainState({"ours": torch.optim.SGD([ours], 0.1)}, ShardedGenerator(0)).update(
            "ours", (ours * value).sum()
        )
    assert ours.item() == 1


def test_without_at_once_a_bad_loss_is_found_by_check():
    ours = weight(1.0)
    state = TrainState({"ours": torch.optim.SGD([ours], 0.1)}, ShardedGenerator(0))
    state.at_once = False
    state.update("ours", ours.sum())
    state.check()
    for value in (float("nan"), 1.0):
        state.update("ours", (ours * value).sum())
    with pytest.raises(NonFiniteLossError, match="a loss or a gradient is not finite"):
        state.check()
    state.check()


def test_epochs():
    state = TrainState({}, ShardedGenerator(0), steps_per_epoch=4)
    state.step = 6
    assert state.epoch == 1.5


def test_a_gradient_that_is_not_finite_changes_nothing():
    ours = weight(0.0)
    with pytest.raises(NonFiniteLossError, match="the gradient of ours is not finite"):
        TrainState({"ours": torch.optim.SGD([ours], 0.1)}, ShardedGenerator(0)).update(
            "ours", ours.sqrt().sum()
        )
    assert ours.item() == 0


def test_gradients_reach_the_optimiser_in_the_layout_of_their_weights():
    """As in einsum's gradient of a weight; Adam's fused kernel on a GPU raises where strides differ."""
    ours = torch.nn.Parameter(torch.rand(3, 4))
    (gradient,) = torch.autograd.grad(loss_of_a_transpose(ours), ours)
    assert gradient.stride() != ours.stride()
    seen = []
    optimizer = torch.optim.SGD([ours], 0.1)
    optimizer.register_step_pre_hook(lambda *_: seen.append(ours.grad))
    TrainState({"ours": optimizer}, ShardedGenerator(0)).update("ours", loss_of_a_transpose(ours))
    assert seen[0].stride() == ours.stride()
    assert torch.equal(seen[0], gradient)


def loss_of_a_transpose(x):
    return (x.t().exp() * torch.arange(4.0)[:, None]).sum()
