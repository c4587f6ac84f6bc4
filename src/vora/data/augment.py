"""Images changed a little each time that they are drawn, so that few of them teach more."""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image, ImageEnhance

from vora.data.schema import Sample
from vora.data.turns import text_in

SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)
LONGEST_RATIO = 4 / 3  # of a crop's sides, relative to the image's own


def augmented(
    sample: Sample, rng: random.Random, crop: float = 1.0, flip: bool = False, colour: float = 0.0
) -> Sample:
    """A sample whose images are opened and changed, all frames of a video alike; ValueError if one cannot be read.

    Args:
        rng: the same one gives the same images.
        crop: the least share of an image's area that is kept; 1 keeps all.
        flip: mirror half of the images, but none that is spoken of with "left" or "right".
        colour: brightness, contrast and saturation are each multiplied by up to 1 + colour or down to 1 - colour.
    """
    texts = (text_in(message) for conversation in sample.conversations for message in conversation)
    may_flip = flip and not any(map(SIDES.search, texts))
    images = []
    for opened in sample.open_images():
        frames = opened if isinstance(opened, list) else [opened]
        box = _crop_box(frames[0].size, crop, rng)
        mirror = may_flip and rng.random() < 0.5
        factors = [rng.uniform(1 - colour, 1 + colour) for _ in range(3)]
        frames = [_changed(frame, box, mirror, factors) for frame in frames]
        images.append(frames if isinstance(opened, list) else frames[0])
    return replace(sample, images=images)


def _crop_box(size: tuple[int, int], least: float, rng: random.Random) -> tuple[int, int, int, int]:
    """(left, top, right, bottom): a share of the area between `least` and all, at nearly the image's own aspect."""
    share = rng.uniform(least, 1.0)
    aspect = math.sqrt(LONGEST_RATIO ** rng.uniform(-1, 1)) if least < 1 else 1.0
    width = min(size[0], max(1, round(size[0] * math.sqrt(share) * aspect)))
    height = min(size[1], max(1, round(size[1] * math.sqrt(share) / aspect)))
    left, top = rng.randint(0, size[0] - width), rng.randint(0, size[1] - height)
    return left, top, left + width, top + height


def _changed(
    image: Image.Image, box: tuple[int, int, int, int], mirror: bool, factors: Sequence[float]
) -> Image.Image:
    if box != (0, 0, *image.size):
        image = image.crop(box)
    if mirror:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for change, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors):
        if factor != 1.0:
            image = change(image).enhance(factor)
    return image
