import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from infocapsgan.data import DataError, ImageShape
from infocapsgan.data.images import read_image, to_images

GREY, COLOUR = ImageShape(1, 28, 10), ImageShape(3, 32, 2)
RED = (200, 50, 50)
LUMINANCE_OF_RED = round(0.299 * 200 + 0.587 * 50 + 0.114 * 50)


def saved(image, path, **options):
    image.save(path, **options)
    return path


def window(mode):
    """Red or grey, transparent but for its middle."""
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[..., :3] = RED
    pixels[8:24, 8:24, 3] = 255
    image = Image.fromarray(pixels)
    if mode == "PA":
        with_palette = image.convert("RGB").quantize().convert("PA")
        with_palette.putalpha(image.getchannel("A"))
        return with_palette
    return image.quantize() if mode == "P" else image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix", "options"),
    [
        ("RGBA", "png", {}),
        ("RGBA", "webp", {"lossless": True}),
        ("P", "png", {}),
        ("PA", "tif", {}),
        ("RGBA", "gif", {}),
    ],
)
def test_transparency_is_composited_on_black(mode, suffix, options, tmp_path):
    pixels = read_image(saved(window(mode), tmp_path / f"x.{suffix}", **options), 3, 32).int()
    assert (pixels[:, :8] == 0).all()
    assert (pixels[:, 8:24, :8] == 0).all()
    assert ((pixels[:, 8:24, 8:24] - torch.tensor(RED)[:, None, None]).abs() <= 2).all()


def test_half_transparent_pixels_are_blended(tmp_path):
    path = saved(Image.new("RGBA", (28, 28), (200, 100, 50, 128)), tmp_path / "x.png")
    assert read_image(path, 3, 28)[:, 0, 0].tolist() == pytest.approx([100, 50, 25], abs=1)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_transparency(channels, tmp_path):
    pixels = read_image(saved(window("LA"), tmp_path / "x.png"), channels, 32)
    assert pixels.shape == (channels, 32, 32)
    assert (pixels[:, :8] == 0).all()
    assert pixels[:, 8:24, 8:24].unique().tolist() == [LUMINANCE_OF_RED]


@pytest.mark.parametrize(
    ("mode", "transparent", "other", "wanted"),
    [
        ("RGB", (9, 200, 9), (50, 60, 70), [50, 60, 70]),
        ("L", 90, 60, [60, 60, 60]),
        ("I;16", 90 * 257, 60 * 257, [60, 60, 60]),
    ],
)
def test_one_colour_is_transparent(mode, transparent, other, wanted, tmp_path):
    image = Image.new(mode, (28, 28), transparent)
    image.paste(Image.new(mode, (14, 28), other), (0, 0))
    pixels = read_image(saved(image, tmp_path / "x.png", transparency=transparent), 3, 28)
    assert pixels[:, 0, 0].tolist() == wanted
    assert pixels[:, 0, 27].tolist() == [0, 0, 0]


SHOWN = {1: "top", 2: "top", 3: "bottom", 4: "bottom", 5: "left", 6: "right", 7: "right", 8: "left"}


@pytest.mark.parametrize(("mode", "white"), [("RGB", (255, 255, 255)), ("I;16", 65535)])
@pytest.mark.parametrize("orientation", SHOWN)
def test_exif_orientation_is_applied(orientation, mode, white, tmp_path):
    image = Image.new(mode, (40, 40))
    image.paste(Image.new(mode, (40, 20), white), (0, 0))  # the upper half
    exif = Image.Exif()
    exif[0x112] = orientation
    pixels = read_image(saved(image, tmp_path / "x.png", exif=exif), 1, 28)[0]
    parts = {"top": pixels[:12], "bottom": pixels[-12:], "left": pixels[:, :12], "right": pixels[:, -12:]}
    assert [name for name, part in parts.items() if (part == 255).all()] == [SHOWN[orientation]]


def test_the_middle_square_is_resized_as_pillow_does(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8))
    path, box = saved(image, tmp_path / "x.png"), (0, 10, 40, 50)
    wanted = np.asarray(image.resize((32, 32), box=box))
    assert np.array_equal(read_image(path, 3, 32).permute(1, 2, 0), wanted)
    assert np.array_equal(read_image(path, 1, 32)[0], image.convert("L").resize((32, 32), box=box))


def test_channels(tmp_path):
    grey = saved(Image.new("L", (28, 28), 77), tmp_path / "grey.png")
    assert (read_image(grey, 3, 28) == 77).all()
    red = saved(Image.new("RGB", (28, 28), RED), tmp_path / "red.png")
    assert (read_image(red, 1, 28) == LUMINANCE_OF_RED).all()


@pytest.mark.parametrize(
    "error", [KeyError, MemoryError, OverflowError, RecursionError, SyntaxError, ValueError, struct.error]
)
def test_whatever_a_decoder_raises_names_the_file(error, tmp_path, monkeypatch):
    path = saved(Image.new("L", (28, 28)), tmp_path / "x.png")

    def broken(*_):
        raise error("no good")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", broken)
    with pytest.raises(DataError, match=rf"{path} cannot be read as an image \(.*no good.*\)"):
        read_image(path, 1, 28)


def test_a_text_chunk_that_is_too_large_names_its_file(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    path = saved(Image.new("L", (28, 28)), tmp_path / "x.png", pnginfo=info)
    with pytest.raises(DataError, match=rf"{path} cannot be read"):
        read_image(path, 1, 28)


def test_a_file_cut_short_is_named(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8))
    path = saved(image, tmp_path / "x.png")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=rf"{path} cannot be read"):
        read_image(path, 1, 28)


@pytest.mark.parametrize("name", ["folder", "missing.png"])
def test_what_is_no_file_is_named(name, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=rf"{name} cannot be read as an image \(it is no file\)"):
        read_image(tmp_path / name, 1, 28)


def test_large_pictures_do_not_warn(tmp_path, monkeypatch):
    path = saved(Image.new("L", (100, 100)), tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(path, 1, 28)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="decompression bomb"):
        read_image(path, 1, 28)


def noise(*shape, kind=torch.uint8):
    pixels = torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).byte()
    return pixels if kind == torch.uint8 else pixels.to(kind) / 255


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_pixels_of_the_right_shape_stay_as_they_are(kind):
    images = noise(4, 3, 32, 32, kind=kind)
    last = images.movedim(1, 3)
    for one in (images, images.numpy(), list(images), [*images.numpy()], last, last.numpy()):
        result = to_images(one, COLOUR)
        assert result.dtype == kind
        assert torch.equal(result, images)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_all_floats_become_float32(kind):
    images = noise(2, 1, 28, 28, kind=kind)
    result = to_images(images, GREY)
    assert result.dtype == torch.float32
    assert torch.equal(result, images.float())
    if kind != torch.bfloat16:
        assert torch.equal(to_images(images.numpy(), GREY), result)


def test_one_picture():
    grey, colour = noise(28, 28), noise(3, 32, 32)
    for one in (grey, grey[None], grey[:, :, None], grey[None, None], Image.fromarray(grey.numpy())):
        assert torch.equal(to_images(one, GREY), grey[None, None])
    last = colour.permute(1, 2, 0)
    for one in (colour, last, colour[None], last.numpy(), Image.fromarray(last.numpy())):
        assert torch.equal(to_images(one, COLOUR), colour[None])


@pytest.mark.parametrize("shape", [GREY, COLOUR])
@pytest.mark.parametrize(
    "source", [(48, 40, 3), (28, 28, 3), (32, 32, 3), (50, 60, 1), (32, 32, 1), (28, 28, 1)]
)
def test_other_shapes_are_brought_to_the_right_one_as_files_are(source, shape, tmp_path):
    pixels = noise(*source)
    image = Image.fromarray(pixels.squeeze(2).numpy())
    path = saved(image, tmp_path / "x.png")
    wanted = read_image(path, shape.channels, shape.size)[None]
    for one in (path, str(path), pixels, pixels.numpy(), image, pixels[None], pixels.permute(2, 0, 1)):
        assert torch.equal(to_images(one, shape), wanted)
    of_floats = to_images(pixels.double() / 255, shape)
    torch.testing.assert_close(
        of_floats if of_floats.dtype == torch.uint8 else of_floats * 255, wanted, check_dtype=False
    )


def test_a_mixed_sequence(tmp_path):
    pixels = noise(28, 28)
    path = saved(Image.fromarray(pixels.numpy()), tmp_path / "x.png")
    result = to_images([path, pixels, Image.open(path), pixels[None, None].repeat(2, 1, 1, 1)], GREY)
    assert torch.equal(result, pixels.expand(5, 1, 28, 28))
    result = to_images((pixels.float() / 255, path), GREY)
    torch.testing.assert_close(result, pixels.expand(2, 1, 28, 28) / 255)


def test_arrays_of_any_layout_in_memory():
    pixels = noise(28, 28).numpy()
    read_only = pixels.copy()
    read_only.setflags(write=False)
    for one in (pixels[::-1].copy()[::-1], np.asfortranarray(pixels), read_only):
        assert torch.equal(to_images(one, GREY)[0, 0], torch.from_numpy(pixels))
    fractions = (pixels / 255).astype(np.float32)
    assert torch.equal(to_images(fractions.astype(">f4"), GREY)[0, 0], torch.from_numpy(fractions))


@pytest.mark.parametrize(
    "shape",
    [
        (5, 28, 28),
        (28, 28, 4),
        (2, 2, 28, 28),
        (3, 28, 3),
        (1, 28, 1),
        (7,),
        (1, 1, 1, 28, 28),
        (0, 1, 28, 28),
        (),
    ],
)
def test_ambiguous_and_other_shapes_are_refused(shape):
    for one in (torch.zeros(shape), np.zeros(shape, np.uint8)):
        with pytest.raises(ValueError, match="images: got an array of shape .*, takes ") as caught:
            to_images(one, GREY)
        assert f"shape {shape}, takes" in str(caught.value)


@pytest.mark.parametrize("value", [-0.01, 1.01, 255.0, float("nan"), float("inf")])
def test_floats_outside_of_0_to_1_are_refused(value):
    images = torch.full((1, 28, 28), 0.5)
    images[0, 3, 4] = value
    for one in (images, images.numpy(), images.double().numpy(), [images]):
        with pytest.raises(ValueError, match=r"images: got floats from .* to .*, takes uint8, or floats in"):
            to_images(one, GREY)


@pytest.mark.parametrize("kind", ["bool", "int64", "int32", "uint16", "complex64"])
def test_other_types_of_values_are_refused(kind):
    for one in (np.zeros((28, 28), kind), torch.zeros(28, 28, dtype=getattr(torch, kind))):
        with pytest.raises(TypeError, match=f"images: got values of torch.{kind}, takes uint8, or floats in"):
            to_images(one, GREY)


@pytest.mark.parametrize("one", [None, 7, [7], [[0.5, 0.5]], {"a": 1}])
def test_what_is_no_picture_is_refused(one):
    with pytest.raises(TypeError, match="images: got .*, takes tensors, arrays, PIL images, paths or lists"):
        to_images(one, GREY)


def test_no_picture_at_all():
    with pytest.raises(ValueError, match="images: got an empty sequence"):
        to_images([], GREY)


def test_a_pil_image_is_not_changed():
    image = window("RGBA")
    before = image.tobytes()
    to_images(image, GREY)
    assert (image.mode, image.tobytes()) == ("RGBA", before)
    with pytest.raises(ValueError, match="pixels of 32 bits"):
        to_images(Image.new("F", (28, 28)), GREY)
