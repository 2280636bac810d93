import torch

from infocapsgan.data.dataset import evenly


def test_images_are_taken_from_all_of_a_set():
    assert evenly(torch.arange(10), 4).tolist() == [0, 3, 6, 9]
    assert evenly(torch.arange(5), 5).tolist() == [0, 1, 2, 3, 4]
