import numpy as np
import pytest
import torch
from PIL import Image

from infocapsgan.data import DataError, image_shape, load
from infocapsgan.data.class_names import class_names


def paint(path, colour, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_class_folders_make_the_labels(tmp_path):
    for number in range(10):
        paint(tmp_path / "red" / f"{number}.png", (255, 0, 0))
        paint(tmp_path / "blue" / f"{number}.png", (0, 0, 255))
    (tmp_path / "red" / "notes.txt").write_text("no image")
    dataset = load("folder", tmp_path)
    assert image_shape("folder", tmp_path) == (3, 32, 2)
    assert dataset.train_images.shape == (16, 3, 32, 32)
    assert dataset.test_labels.bincount().tolist() == [2, 2]
    blue = dataset.train_images[dataset.train_labels == 0]
    assert (blue == torch.tensor([0, 0, 255], dtype=torch.uint8).view(1, 3, 1, 1)).all()


def test_train_and_test_folders(tmp_path):
    paint(tmp_path / "train" / "a" / "1.jpg", (0, 0, 0))
    paint(tmp_path / "train" / "b" / "1.jpg", (0, 0, 0))
    paint(tmp_path / "test" / "b" / "1.jpg", (0, 0, 0))
    dataset = load("folder", tmp_path)
    assert sorted(dataset.train_labels.tolist()) == [0, 1]
    assert dataset.test_labels.tolist() == [1]


@pytest.mark.parametrize("parts", [("",), ("train", "test")])
def test_the_first_images_of_a_split_are_a_fair_sample(tmp_path, parts):
    for part in parts:
        for label, name in enumerate("abcd"):
            for number in range(50):
                paint(tmp_path / part / name / f"{number:02}.png", (label, number, 0), (32, 32))
    dataset, again = load("folder", tmp_path), load("folder", tmp_path)
    for split in ("train", "test"):
        images, labels = getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels")
        assert torch.equal(images, getattr(again, f"{split}_images"))
        assert torch.equal(images[:, 0, 0, 0], labels)  # each image has kept its own label
        assert len(images[:, :2, 0, 0].unique(dim=0)) == len(images)
        assert labels[: len(labels) // 2].bincount(minlength=4).min() >= len(labels) // 16


@pytest.mark.parametrize(("first", "second"), [("train", "val"), ("test", "training")])
def test_train_and_test_come_together(tmp_path, first, second):
    for split in (first, second):
        for name in ("a", "b"):
            for number in range(5):
                paint(tmp_path / split / name / f"{number}.png", (0, 0, 0))
    for read in (load, image_shape, class_names):
        with pytest.raises(DataError, match=f"folders {first}, {second}; .* takes both train and test, or"):
            read("folder", tmp_path)


def test_classes_of_the_test_split_that_cannot_be_learned(tmp_path):
    for name in ("train/a", "test/a", "test/b", "test/c"):
        paint(tmp_path / name / "1.png", (0, 0, 0))
    with pytest.raises(DataError, match=r"test holds classes that .*train lacks: b, c$"):
        load("folder", tmp_path)


def test_hidden_files_are_no_images_and_hidden_folders_no_classes(tmp_path):
    hidden = ".ipynb_checkpoints"
    for split in ("train", "test"):
        for name in ("a", "b", f"a/{hidden}", hidden):
            paint(tmp_path / split / name / "1.png", (0, 0, 0))
        (tmp_path / split / "b" / "._1.png").write_bytes(b"no image")
    dataset = load("folder", tmp_path)
    assert class_names("folder", tmp_path) == ["a", "b"]
    assert dataset.train_labels.bincount().tolist() == dataset.test_labels.bincount().tolist() == [1, 1]


def test_without_class_folders_a_code_has_ten_values(tmp_path):
    for number in range(5):
        paint(tmp_path / f"{number}.png", (number, 0, 0), (20, 20))
    dataset = load("folder", tmp_path)
    assert image_shape("folder", tmp_path).classes == 10
    assert (len(dataset.train_labels), len(dataset.test_labels)) == (4, 1)
    assert dataset.train_labels.tolist() == [0] * 4


def test_one_class_folder_makes_no_labels(tmp_path):
    for number in range(5):
        paint(tmp_path / "all" / f"{number}.png", (number, 0, 0), (20, 20))
    assert image_shape("folder", tmp_path).classes == 10
    assert class_names("folder", tmp_path) == [str(j) for j in range(10)]
    dataset = load("folder", tmp_path)
    assert dataset.train_labels.tolist() == [0] * 4
    assert not dataset.labelled
    assert load("digits").labelled


@pytest.mark.parametrize("name", ["png", "tif", "pgm"])
def test_grey_images_of_16_bits(name, tmp_path):
    values = np.full((4, 32, 32), 40 * 257 + 100, dtype=np.uint16)
    for number, image in enumerate(values):
        Image.fromarray(image).save(tmp_path / f"{number}.{name}")
    assert load("folder", tmp_path).train_images.unique().tolist() == [40]


@pytest.mark.parametrize(("mode", "kind"), [("F", np.float32), ("I", np.int32)])
def test_images_of_32_bits_are_refused(mode, kind, tmp_path):
    for number in range(4):
        Image.fromarray(np.ones((32, 32), dtype=kind)).save(tmp_path / f"{number}.tif")
    with pytest.raises(DataError, match=rf"\.tif has pixels of 32 bits \(mode {mode}\); takes 8 or 16"):
        load("folder", tmp_path)


def test_the_middle_square_is_taken(tmp_path):
    image = Image.new("RGB", (64, 32), (0, 0, 0))
    image.paste((255, 255, 255), (16, 0, 48, 32))
    image.save(tmp_path / "0.png")
    paint(tmp_path / "1.png", (255, 255, 255))
    dataset = load("folder", tmp_path)
    assert (dataset.train_images == 255).all()
    assert (dataset.test_images == 255).all()


def test_errors(tmp_path):
    with pytest.raises(DataError, match="--data-dir: got None, takes the directory of images"):
        load("folder")
    with pytest.raises(DataError, match="holds no images"):
        load("folder", tmp_path)
    (tmp_path / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png cannot be read as an image"):
        load("folder", tmp_path)
    paint(tmp_path / "0.png", (0, 0, 0))
    with pytest.raises(DataError, match="too few images"):
        load("folder", tmp_path)
