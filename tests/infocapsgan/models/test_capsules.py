import pytest
import torch

import capsops
from infocapsgan.models.capsule_encoder import CapsuleEncoder, lengths, primary_grid, unsquashed_lengths
from infocapsgan.models.capsule_generator import CapsuleGenerator
from tests.parameters import parameter_count


@pytest.mark.parametrize(("size", "grid"), [(28, 6), (32, 8), (36, 10)])
def test_the_generator_is_the_encoder_turned_round(size, grid):
    assert primary_grid(size, 9) == grid
    generator = CapsuleGenerator(12, 3, size, 5, width=16)
    images, given = generator(torch.randn(2, 12))
    seen = CapsuleEncoder(3, size, 5, width=16)(images)
    assert images.shape == (2, 3, size, size)
    assert given.classes.shape == seen.classes.shape == (2, 5, 16)
    assert given.primary.shape == seen.primary.shape == (2, 2 * grid**2, 8)
    assert images.abs().max() <= 1


def test_a_primary_capsule_of_the_generator_is_eight_channels_at_one_position():
    generator = CapsuleGenerator(12, 1, 28, 5, width=16).eval()
    seen = []
    generator.enlarge.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    _, capsules = generator(torch.randn(2, 12))
    for kind, row, column in ((0, 0, 0), (1, 2, 5)):
        capsule = capsules.primary[:, kind * 36 + row * 6 + column]
        torch.testing.assert_close(seen[0][:, kind * 8 : kind * 8 + 8, row, column], capsule)


def test_published_parameter_counts():
    assert parameter_count(CapsuleEncoder(1, 28, 10)) == 6_804_384
    assert parameter_count(CapsuleGenerator(62, 1, 28, 10)) == 8_059_585


def test_the_length_of_a_capsule_of_zeros_has_no_gradient():
    capsules = torch.zeros(1, 2, 4, requires_grad=True)
    lengths(capsules).sum().backward()
    assert torch.equal(capsules.grad, torch.zeros(1, 2, 4))


def test_the_length_before_squash():
    s = torch.tensor([[3.0, 4], [0.03, 0.04], [1e-4, 0]], requires_grad=True)
    found = unsquashed_lengths(capsops.squash(s))
    torch.testing.assert_close(found, s.norm(dim=1))
    found.sum().backward()
    torch.testing.assert_close(s.grad, (s / s.norm(dim=1, keepdim=True)).detach())


@pytest.mark.parametrize("value", [0.0, 1.0, 1.5])
def test_the_length_before_squash_where_there_is_none(value):
    capsules = torch.tensor([[value, 0.0]], requires_grad=True)
    found = unsquashed_lengths(capsules)
    found.sum().backward()
    assert 0 <= found.item() <= 100
    assert torch.isfinite(capsules.grad).all()
