"""Images for pages: as data URLs, rebuilt from what a model is given, with the grid of its image tokens; and changed,
to see whether a model looks."""

import base64
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

LIGHT, DARK = (255, 255, 255, 130), (0, 0, 0, 70)  # lines of a grid, to be seen on dark and on light


def data_url(image: Image.Image, kind: str = "jpeg") -> str:
    """An image inside a page: `jpeg`, or `png` where every pixel counts."""
    buffer = BytesIO()
    image.save(buffer, format=kind, quality=90)
    return bytes_url(buffer.getvalue(), f"image/{kind}")


def bytes_url(data: bytes, mime_type: str) -> str:
    """A file inside a page."""
    return f"data:{mime_type};base64," + base64.b64encode(data).decode()


def image_of_patches(patches: np.ndarray, rows: int, columns: int, image_processor: Any) -> Image.Image:
    """Normalised patches, float[rows * columns, C*p*p], back to the image that an image processor cut them from."""
    p = image_processor.patch_size
    pixels = patches.reshape(rows, columns, 3, p, p).transpose(0, 3, 1, 4, 2).reshape(rows * p, columns * p, 3)
    pixels = pixels * np.asarray(image_processor.image_std, np.float32)
    pixels = pixels + np.asarray(image_processor.image_mean, np.float32)
    return Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8))


def with_grid(image: Image.Image, cell_pixels: int, side: int = 320) -> Image.Image:
    """An image, enlarged up to 4 times towards `side` pixels, with lines between cells of `cell_pixels`."""
    scale = max(1, min(4, side // max(image.size)))
    shown = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).convert("RGB")
    draw, step = ImageDraw.Draw(shown, "RGBA"), cell_pixels * scale
    for shift, colour in ((0, LIGHT), (1, DARK)):
        for x in range(step, shown.width, step):
            draw.line([(x + shift, 0), (x + shift, shown.height)], colour)
        for y in range(step, shown.height, step):
            draw.line([(0, y + shift), (shown.width, y + shift)], colour)
    return shown


def blank(image: Image.Image) -> Image.Image:
    """An image's mean colour, at its size."""
    colour = np.asarray(image).reshape(-1, 3).mean(0).round().astype(int)
    return Image.new("RGB", image.size, tuple(colour.tolist()))


def shuffled(image: Image.Image, image_processor: Any, seed: int) -> Image.Image:
    """An image at the size at which the model reads it, its image tokens (squares of the grid) in another order."""
    inputs = image_processor.preprocess(image, return_tensors="np")
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    image = image_of_patches(inputs["pixel_values"], rows, columns, image_processor)
    merge = image_processor.patch_merge
    rows, columns, side = rows // merge, columns // merge, image_processor.patch_size * merge
    squares = np.asarray(image).reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    draw, order = np.random.default_rng(seed), np.arange(len(squares))
    while len(squares) > 1 and (order == np.arange(len(squares))).all():
        order = draw.permutation(len(squares))
    grid = squares[order].reshape(rows, columns, side, side, 3).swapaxes(1, 2)
    return Image.fromarray(grid.reshape(rows * side, columns * side, 3))
