import torch

from infocapsgan import data
from infocapsgan.data import Dataset, ImageShape, cifar10, mnist, registry, smallnorb
from infocapsgan.data.registry import names, register


def test_names_are_in_their_order():
    single = ("digits", "mnist", "fashion-mnist", "cifar10", "smallnorb", "folder")
    assert single == data.SINGLE_NAMES
    assert (*single[:-1], "multi-mnist", "folder") == data.NAMES


def test_a_set_that_registers_itself_is_known(monkeypatch):
    monkeypatch.setattr(registry, "_SETS", dict(registry._SETS))
    images, labels = torch.zeros(2, 1, 28, 28).byte(), torch.tensor([0, 1])

    @register("letters", ImageShape(1, 28, 2))
    def load(data_dir=None):
        return Dataset("letters", images, labels, images, labels, class_names=("a", "b"))

    assert names()[-1] == names(labels=1)[-1] == "letters"
    assert data.load("letters").class_names == ("a", "b")
    assert data.image_shape("letters") == (1, 28, 2)
    assert load().name == "letters"


def test_there_is_a_name_for_each_class():
    named = {"cifar10": cifar10.CLASSES, "smallnorb": smallnorb.TOYS, "fashion-mnist": mnist.CLOTHES}
    for name, classes in named.items():
        assert len(classes) == data.image_shape(name).classes
