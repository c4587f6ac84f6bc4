"""Which samples are held out: whole images, by seed, wherever the data lies."""

from dataclasses import replace

import pytest
from PIL import Image

from vora.data.held_out import HeldOut, key_of_image
from vora.data.images import VideoPath
from vora.data.schema import Sample

HALF = HeldOut(0.5, 0)


def sample(*images, text="what?"):
    return Sample("row", list(images), [[{"role": "user", "content": text}]])


def sides(held_out, count=2000):
    return [held_out.holds(sample(f"{number}.png")) for number in range(count)]


def test_the_share_and_the_seed_say_which():
    assert abs(sum(sides(HALF)) / 2000 - 0.5) < 0.04 and abs(sum(sides(HeldOut(0.02, 0))) / 2000 - 0.02) < 0.01
    assert sides(HALF) == sides(HALF) != sides(replace(HALF, seed=1))
    few, many = sides(HeldOut(0.1, 3)), sides(HeldOut(0.2, 3))
    assert all(more for less, more in zip(few, many) if less)  # a larger share only adds


def test_rows_of_an_image_go_together_wherever_it_lies():
    for number in range(50):
        name = f"{number}.png"
        places = {HALF.holds(sample(place + name, text=place)) for place in ("", "/a/", "b/c/")}
        assert len(places) == 1
    texts = {text: HALF.holds(sample(text=text)) for text in map(str, range(50))}
    assert set(texts.values()) == {True, False} and all(
        HALF.holds(sample(text=t)) is side for t, side in texts.items()
    )


def test_a_row_of_images_of_both_sides_belongs_to_neither():
    inside = next(f"{n}.png" for n in range(99) if HALF.holds(sample(f"{n}.png")))
    outside = next(f"{n}.png" for n in range(99) if not HALF.holds(sample(f"{n}.png")))
    assert HALF.holds(sample(inside, outside)) is None
    assert HALF.holds(sample(inside, inside)) is True and HALF.holds(sample(outside, outside)) is False
    assert HALF.holds(sample([inside, outside])) is True  # a video is one


def test_an_image_is_known_by_name_or_content():
    image = Image.new("RGB", (2, 3), (1, 2, 3))
    keys = [key_of_image(one) for one in (image, b"png", "a/b.png", VideoPath("b.gif"), ["f1.png", "f2.png"])]
    assert keys == [b"(2, 3)" + bytes([1, 2, 3] * 6), b"png", b"b.png", b"b.gif", b"f1.png"]
    assert key_of_image("http://x/1.png") != key_of_image("http://y/1.png")
    for bad in (5, [], [5], None):
        with pytest.raises(ValueError, match="and none that is known"):
            key_of_image(bad)
