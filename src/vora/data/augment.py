"""Images changed a little each time that they are drawn, so that few of them teach more."""

import math
import re
from dataclasses import replace

from PIL import Image, ImageEnhance

SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)
LONGEST_RATIO = 4 / 3  # of a crop's sides, relative to the image's own


def augmented(record, rng, crop=1.0, flip=False, colour=0.0):
    """A record whose images are opened and changed; all frames of a video alike.

    Args:
        record: a `Record`.
        rng: a `random.Random`; the same one gives the same images.
        crop: the least share of an image's area that is kept; 1 keeps all.
        flip: mirror half of the images, but none that is spoken of with "left" or "right".
        colour: brightness, contrast and saturation are each multiplied by up to 1 + colour or down to 1 - colour.

    Raises:
        ValueError: an image cannot be read.
    """
    may_flip = flip and not _names_a_side(record.conversations)
    images = []
    for opened in record.open_images():
        frames = opened if isinstance(opened, list) else [opened]
        box = _crop_box(frames[0].size, crop, rng)
        mirror = may_flip and rng.random() < 0.5
        factors = [rng.uniform(1 - colour, 1 + colour) for _ in range(3)]
        frames = [_changed(frame, box, mirror, factors) for frame in frames]
        images.append(frames if isinstance(opened, list) else frames[0])
    return replace(record, images=images)


def _names_a_side(conversations):
    def texts(content):
        return [content] if isinstance(content, str) else [part.get("text", "") for part in content]

    return any(SIDES.search(text) for turns in conversations for turn in turns for text in texts(turn["content"]))


def _crop_box(size, least, rng):
    """(left, top, right, bottom): a share of the area between `least` and all, at nearly the image's own aspect."""
    share = rng.uniform(least, 1.0)
    segment = math.sqrt(LONGEST_RATIO ** rng.uniform(-1, 1)) if least < 1 else 1.0
    width = min(size[0], max(1, round(size[0] * math.sqrt(share) * segment)))
    height = min(size[1], max(1, round(size[1] * math.sqrt(share) / segment)))
    left, top = rng.randint(0, size[0] - width), rng.randint(0, size[1] - height)
    return left, top, left + width, top + height


def _changed(image, box, mirror, factors):
    if box != (0, 0, *image.size):
        image = image.crop(box)
    if mirror:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for change, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors):
        if factor != 1.0:
            image = change(image).enhance(factor)
    return image
