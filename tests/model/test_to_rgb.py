"""Modes, transparency, rotation and arrays become the RGB image that people see."""

import numpy as np
import pytest
import torch
from messages import coloured, noise
from PIL import Image

from vora.model.fetch_image import fetch_image, is_animated


def read_back(image, kind, tmp_path, **kwargs):
    path = tmp_path / f"image.{kind.lower()}"
    image.save(path, kind, **kwargs)
    found = fetch_image(path)
    assert found.mode == "RGB"
    return found


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG", "AVIF", "MPO"])
def test_formats_of_the_list_are_read(tmp_path, kind):
    found = read_back(coloured("white"), kind, tmp_path)
    assert found.size == (12, 12) and min(found.getpixel((5, 5))) > 250
    if kind == "JPEG":
        red = read_back(coloured((0, 255, 255, 0), (16, 16), "CMYK"), kind, tmp_path).getpixel((8, 8))
        assert red[0] > 200 and max(red[1:]) < 60


@pytest.mark.parametrize(
    "dtype, values, unit",
    [
        (np.uint16, [0, 256, 32768, 65535], 257), (np.uint16, [0, 100, 255], 257),  # the second is dark, not of 8 bits
        (np.int32, [0, 128, 255], 1), (np.float32, [0, 128, 255], 1), (np.float32, [0, 0.5, 1], 1 / 255),
    ],
)  # fmt: skip
def test_grey_of_more_than_8_bits_is_scaled_not_clipped(tmp_path, dtype, values, unit):
    kind = "PNG" if dtype == np.uint16 else "TIFF"
    found = read_back(Image.fromarray(np.array([values] * 3, dtype)), kind, tmp_path)
    assert np.abs(np.asarray(found)[0, :, 1] - np.array(values) / unit).max() <= 0.5


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)), ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)), ("LA", (0, 0), (255, 255, 255)),
        ("LA", (100, 255), (100, 100, 100)), ("L", 7, (7, 7, 7)), ("1", 1, (255, 255, 255)),
    ],
)  # fmt: skip
def test_transparency_lies_on_white(tmp_path, mode, colour, expected):
    assert read_back(coloured(colour, (4, 4), mode), "PNG", tmp_path).getpixel((2, 2)) == expected
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 1), 1)
    found = read_back(palette, "PNG", tmp_path, transparency=0)
    assert found.getpixel((0, 0)) == (255, 255, 255) and found.getpixel((1, 1)) == (255, 0, 0)


def test_exif_rotation_is_applied(tmp_path):
    image, exif = noise((6, 4)), Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise
    found = read_back(image, "PNG", tmp_path, exif=exif)
    assert np.array_equal(np.asarray(found), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_all_eight_orientations(kind, tmp_path):
    pixels = np.full((48, 32, 3), 255, np.uint8)
    pixels[:24, :16] = (255, 0, 0)
    pixels[24:, :16] = (0, 0, 255)
    stored = (  # 1 to 8: how an upright image lies in the file
        pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1], pixels.transpose(1, 0, 2),
        np.rot90(pixels), np.rot90(pixels, 2).transpose(1, 0, 2), np.rot90(pixels, -1),
    )  # fmt: skip
    for orientation, lies in enumerate(stored, start=1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = (
            {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
        )
        found = np.asarray(read_back(Image.fromarray(lies.copy()), kind, tmp_path, exif=exif, **options), int)
        assert found.shape == pixels.shape and np.abs(found - pixels).max() < 12, orientation


def test_each_opacity_lies_on_white_as_it_should():
    colours, opacities = np.meshgrid(np.arange(256), np.arange(256))
    image = Image.fromarray(np.stack([colours] * 3 + [opacities], axis=-1).astype(np.uint8))
    expected = 255 - opacities / 255 * (255 - colours)
    assert np.abs(np.asarray(fetch_image(image))[..., 0] - expected).max() <= 0.51


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [coloured(colour, (8, 8)) for colour in ("red", "blue", "lime")]
    found = read_back(frames[0], "GIF", tmp_path, save_all=True, append_images=frames[1:])
    assert found.getpixel((3, 3)) == (255, 0, 0)
    assert is_animated(tmp_path / "image.gif") and not is_animated("http://x.org/image.gif")


def test_arrays():
    pixels = np.asarray(noise((20, 10)))
    for array in (pixels, pixels.transpose(2, 0, 1), torch.from_numpy(pixels.copy()), pixels / 255):
        assert np.array_equal(np.asarray(fetch_image(array)), pixels)
    assert fetch_image(pixels[..., 0]).size == fetch_image(pixels[..., :1]).size == (20, 10)
    assert fetch_image(pixels[:, :1, 0]).size == (1, 10)


def test_arrays_that_are_no_images_are_refused():
    for array, cause in (
        (np.full((4, 4, 3), np.nan), "NaN"), (np.array([[[0.1, 0.2, -0.3]]]), "values from -0.3 to 0.2"),
        (np.array([[[0, 9, 256.0]]]), "values from 0 to 256"), (np.array([[5, -1]], np.int32), "values from -1 to 5"),
        (np.array([[5, -1]], np.int8), "values from -1 to 5"),
        (np.zeros((0, 4, 3)), "shape"), (np.zeros((5, 5, 2), np.uint8), "shape"), (np.zeros(4, np.uint8), "shape"),
        (None, "shape"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"Cannot read image .*{cause}"):
            fetch_image(array)
