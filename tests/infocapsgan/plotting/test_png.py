import torch
from PIL import Image

from infocapsgan.plotting.png import grid, save_curves, save_png


def test_grid_by_hand():
    black, white = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    picture = grid(torch.stack([black, white, white]), 2, gap=1)
    assert picture.shape == (4, 4, 3)
    assert picture[:, :, 0].tolist() == [
        [0, 128, 255, 128],
        [128, 128, 128, 128],
        [255, 128, 128, 128],
        [128, 128, 128, 128],
    ]


def test_colours_stay(tmp_path):
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    save_png(tmp_path / "red.png", grid(red, 1, gap=0), enlarge=3)
    picture = Image.open(tmp_path / "red.png")
    assert picture.size == (6, 6)
    assert picture.getpixel((5, 5)) == (255, 0, 0)


def test_curves(tmp_path):
    rows = [{"kind": "train", "step": 1, "epoch": 0.1, "loss": 2.0, "real_accuracy": 0.5}]
    rows += [{"kind": "evaluation", "step": 1, "epoch": 0.1, "accuracy": 0.3}]
    save_curves(tmp_path / "curves.png", rows, "accuracy", {"chance": 0.1})
    assert Image.open(tmp_path / "curves.png").size[0] > 500
