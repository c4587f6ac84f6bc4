"""Damaged images of each format, read in a process of their own that may take little memory: `image_fuzz.py SEED N`.

Prints how many were read and refused; exits otherwise than with 0 where one ends as neither an image nor a line.
"""

import io
import random
import resource
import sys
from collections import Counter

import numpy as np
from PIL import Image

from vora.model.fetch_image import ImagePolicy, fetch_frames, fetch_image

POLICY = ImagePolicy(max_pixels=2_000_000, max_video_pixels=8_000_000, max_frames=50)
MEMORY, SECONDS = 2 << 30, 10  # of address space, most of it libraries; of processor time for one image
EXTREMES = (b"\0\0", b"\xff\xff", b"\xff\x7f", b"\x7f\xff", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff")


def originals() -> list[bytes]:
    draw = np.random.default_rng(0)
    image = Image.fromarray(draw.integers(0, 256, (24, 32, 3), np.uint8))
    deep = Image.fromarray(draw.integers(0, 65536, (24, 32), np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    several = {"save_all": True, "append_images": [image.rotate(90), image.rotate(180)]}
    return [
        _saved(one, kind, **options)
        for one, kind, options in (
            (image, "PNG", {}), (image.convert("RGBA"), "PNG", {"exif": exif}), (image.quantize(16), "PNG", several),
            (deep, "PNG", {}), (image, "JPEG", {"exif": exif}), (image, "JPEG", {"progressive": True}),
            (image.convert("CMYK"), "JPEG", {}), (image, "WEBP", {"exif": exif}),
            (image, "WEBP", several), (image, "GIF", several), (image, "BMP", {}), (image, "TIFF", several),
            (image, "TIFF", {"compression": "tiff_lzw"}), (image, "TIFF", {"compression": "jpeg", "exif": exif}),
            (deep, "TIFF", {"compression": "tiff_deflate"}), (image, "PPM", {}), (image, "AVIF", {}),
            (image, "AVIF", several), (image, "MPO", several),
        )
    ]  # fmt: skip


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A few changes: a byte, a number at its extreme, a part left out, moved or repeated; often near the start."""
    found = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(min(len(found), draw.choice((64, 400, 10**6))) or 1)
        part = found[place : place + draw.randint(1, 40)]
        match draw.randrange(5):
            case 0:
                found[place : place + 1] = bytes([draw.randrange(256)])
            case 1:
                extreme = draw.choice(EXTREMES)
                found[place : place + len(extreme)] = extreme
            case 2:
                del found[place : place + len(part)]
            case 3:
                found[place:place] = part * draw.choice((1, 2, 500))
            case 4:
                other = draw.randrange(len(found) + 1)
                found[other : other + len(part)] = part
    return bytes(found if draw.random() > 0.1 else found[: draw.randrange(len(found) + 1)])


def outcome(use, content: bytes) -> str:
    try:
        found = use(content, policy=POLICY)
    except ValueError as error:
        assert "\n" not in str(error) and "emory" not in str(error), error
        return "refused"
    for image in found if isinstance(found, list) else [found]:
        assert image.mode == "RGB" and 0 < image.width * image.height <= POLICY.max_pixels, image
    return "read"


def _saved(image, kind, **options) -> bytes:
    stream = io.BytesIO()
    image.copy().save(stream, kind, **options)  # a JPEG's settings stay with the image that was saved
    return stream.getvalue()


if __name__ == "__main__":
    seed, count = map(int, sys.argv[1:])
    if sys.platform == "linux":  # others do not hold to it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    outcomes, draw = Counter(), random.Random(seed)
    for content in originals():
        for use in (fetch_image, fetch_frames):
            assert outcome(use, content) == "read"
        for _ in range(count):
            sample = damaged(content, draw)
            used = resource.getrusage(resource.RUSAGE_SELF)
            most = int(used.ru_utime + used.ru_stime) + SECONDS  # the limit counts both
            resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))  # ends the process
            outcomes[outcome(draw.choice((fetch_image, fetch_frames)), sample)] += 1
    print(dict(outcomes))
