import os

import numpy as np
import pytest
import torch
from PIL import Image

from infocapsgan.data import DataError, image_shape, load


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
    assert dataset.class_names == ("blue", "red")
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
    for read in (load, image_shape):
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
    assert dataset.class_names == ("a", "b")
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
    dataset = load("folder", tmp_path)
    assert dataset.class_names == tuple("0123456789")
    assert dataset.train_labels.tolist() == [0] * 4
    assert not dataset.labelled
    assert load("digits").labelled


@pytest.mark.parametrize("name", ["png", "tif", "pgm"])
def test_grey_images_of_16_bits(name, tmp_path):
    values = np.full((4, 32, 32), 40 * 257 + 100, dtype=np.uint16)
    for number, image in enumerate(values):
        Image.fromarray(image).save(tmp_path / f"{number}.{name}")
    dataset = load("folder", tmp_path)
    assert dataset.train_images.shape == (3, 1, 32, 32)
    assert dataset.train_images.unique().tolist() == [40]


@pytest.mark.parametrize(("mode", "kind"), [("F", np.float32), ("I", np.int32)])
def test_images_of_32_bits_are_refused(mode, kind, tmp_path):
    for number in range(4):
        Image.fromarray(np.ones((32, 32), dtype=kind)).save(tmp_path / f"{number}.tif")
    with pytest.raises(DataError, match=rf"\.tif cannot .* pixels of 32 bits \(mode {mode}\); takes 8 or 16"):
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
    with pytest.raises(DataError, match=f"{tmp_path} holds no images, .* passed over: nothing"):
        load("folder", tmp_path)
    (tmp_path / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png cannot be read as an image"):
        load("folder", tmp_path)
    paint(tmp_path / "0.png", (0, 0, 0))
    with pytest.raises(DataError, match="too few images"):
        load("folder", tmp_path)


def grey(number, size=(28, 28)):
    return Image.new("L", size, number)


def classes(root, make=grey, suffix="png", names=("a", "b"), each=5):
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            make(number).save(root / name / f"{number}.{suffix}")


@pytest.mark.parametrize("place", ["", "train", "test"])
def test_a_class_folder_without_images_is_named_with_what_was_passed_over(place, tmp_path):
    for part in ("train", "test") if place else ("",):
        classes(tmp_path / part)
    if place == "test":
        classes(tmp_path / "train", names=("empty",))
    empty = tmp_path / place / "empty"
    empty.mkdir(exist_ok=True)
    for name in ("1.heic", "2.HEIC", "notes", ".hidden"):
        (empty / name).write_text("")
    message = rf"{empty} holds no images, .*; passed over: \.heic \(2\), no suffix \(1\)$"
    for read in (load, image_shape):
        with pytest.raises(DataError, match=message):
            read("folder", tmp_path)


def test_a_test_folder_without_the_class_folders_of_train(tmp_path):
    classes(tmp_path / "train")
    paint(tmp_path / "test" / "1.png", (0, 0, 0))
    with pytest.raises(DataError, match="test holds none of the class folders a, b"):
        load("folder", tmp_path)


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "JPG"])
def test_all_names_of_jpeg_files_are_read(suffix, tmp_path):
    classes(tmp_path)
    (tmp_path / "c").mkdir()
    for number in range(5):
        grey(number).save(tmp_path / "c" / f"{number}.{suffix}", format="JPEG")
    dataset = load("folder", tmp_path)
    assert torch.cat((dataset.train_labels, dataset.test_labels)).bincount().tolist() == [5, 5, 5]


def test_what_is_no_regular_file_is_passed_over(tmp_path):
    folder = tmp_path / "set" / "a"
    classes(tmp_path / "set")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / "nowhere.png").symlink_to(tmp_path / "missing.png")
    grey(77).save(tmp_path / "elsewhere.png")
    (folder / "link.png").symlink_to(tmp_path / "elsewhere.png")
    dataset = load("folder", tmp_path / "set")
    images = torch.cat((dataset.train_images, dataset.test_images))
    assert images[:, 0, 0, 0].sort()[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 77]


@pytest.mark.parametrize(("mode", "suffix"), [("1", "png"), ("L", "jpg"), ("LA", "png"), ("I;16", "png")])
def test_images_that_are_all_grey_have_one_channel(mode, suffix, tmp_path):
    classes(tmp_path, lambda number: Image.new(mode, (28, 28)), suffix)
    assert image_shape("folder", tmp_path) == (1, 32, 2)
    assert load("folder", tmp_path).train_images.shape == (8, 1, 32, 32)
    paint(tmp_path / "b" / "colour.png", (1, 2, 3))
    assert image_shape("folder", tmp_path) == (3, 32, 2)
    assert load("folder", tmp_path).train_images.shape == (8, 3, 32, 32)


def test_a_grey_train_split_beside_a_test_split_of_colours_has_three_channels(tmp_path):
    classes(tmp_path / "train")
    classes(tmp_path / "test", lambda number: Image.new("RGB", (28, 28), (number, 0, 0)))
    dataset = load("folder", tmp_path)
    assert dataset.train_images.shape[1:] == dataset.test_images.shape[1:] == (3, 32, 32)


def test_the_shape_comes_from_the_headers(tmp_path):
    for number in range(5):
        grey(number).save(tmp_path / f"{number}.png")
        whole = (tmp_path / f"{number}.png").read_bytes()
        (tmp_path / f"{number}.png").write_bytes(whole[: whole.index(b"IDAT") + 4])
    assert image_shape("folder", tmp_path) == (1, 32, 10)
    with pytest.raises(DataError, match=r"\.png cannot be read"):
        load("folder", tmp_path)


@pytest.mark.parametrize("size", [28, 64, 128])
def test_the_size_of_images(size, tmp_path):
    classes(tmp_path, lambda number: Image.new("RGB", (150, 140), (number, 0, 0)))
    assert image_shape("folder", tmp_path, image_size=size) == (3, size, 2)
    dataset = load("folder", tmp_path, image_size=size)
    assert dataset.size == size
    assert dataset.train_images.shape == (8, 3, size, size)


@pytest.mark.parametrize("size", [24, 30, 132, 0, -32, 32.0, True, "32"])
def test_other_sizes_are_refused(size, tmp_path):
    classes(tmp_path)
    for read in (load, image_shape):
        with pytest.raises(
            ValueError, match=f"^--image-size: got {size}, takes a multiple of 4 from 28 to 128$"
        ):
            read("folder", tmp_path, image_size=size)


def test_the_size_is_an_option_of_folders_only():
    for read in (load, image_shape):
        with pytest.raises(ValueError, match="--image-size: got 32 with --dataset digits, goes with"):
            read("digits", image_size=32)


@pytest.mark.parametrize("parts", [("",), ("train", "test")])
def test_the_split_says_where_each_image_comes_from(parts, tmp_path):
    for part in parts:
        for name, red in (("a", 0), ("b/deep", 100)):
            for number in range(10):
                paint(tmp_path / part / name / f"{number}.png", (red + number, 0, 0))
    dataset = load("folder", tmp_path)

    def check(dataset):
        assert list(dataset.split) == ["train", "test"]
        for part, paths in dataset.split.items():
            pixels = [Image.open(tmp_path / path).getpixel((0, 0))[0] for path in paths]
            assert pixels == getattr(dataset, f"{part}_images")[:, 0, 0, 0].tolist()

    rest, held_out = dataset.hold_out(0.25)
    for one in (dataset, rest, held_out, dataset.head(3), dataset.centred(), dataset.to("cpu")):
        check(one)
    assert sorted(rest.split["train"] + held_out.split["test"]) == sorted(dataset.split["train"])
    assert rest.split["test"] == dataset.split["test"]


@pytest.mark.parametrize("kind", ["bomb", "pgm", "text"])
def test_a_file_that_no_decoder_takes_is_named(kind, tmp_path):
    classes(tmp_path)
    wrong = tmp_path / "a" / "wrong.png"
    if kind == "bomb":
        Image.new("1", (14000, 14000)).save(wrong)
    elif kind == "pgm":
        wrong.write_bytes(b"P5\n31 2<4\n255\n" + bytes(31 * 24))
    else:
        wrong.write_text("no image")
    for read in (load, image_shape):
        with pytest.raises(DataError, match=r"wrong\.png cannot be read as an image \(.+\)"):
            read("folder", tmp_path)
