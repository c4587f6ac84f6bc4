"""Images made to harm: small files that would cost gigabytes or minutes, and damage of all kinds."""

import base64
import io
import os
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from messages import coloured, noise

from vora.model.fetch_image import POLICY, ImagePolicy, fetch_frames, fetch_image, is_base64, limited_frames
from vora.model.image_processing_vora import Video

FUZZ = Path(__file__).with_name("image_fuzz.py")


def saved(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def tiff(side, tile_side, pixels):
    """A TIFF in one tile of bytes, deflated."""
    data = zlib.compress(pixels)
    tags = {
        256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile_side, 323: tile_side, 324: 134,
        325: len(data),
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + data


def test_no_program_is_started_for_what_is_not_on_the_list(processor, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(os, "system", None)
    script = saved(coloured("red"), "EPS")
    encoded = base64.b64encode(script).decode()
    for source in (script, encoded, f"data:image/png;base64,{encoded}", {"bytes": script}):
        for use in (fetch_image, fetch_frames, Video, processor.image_processor):
            with pytest.raises(ValueError, match="not an image of a known format|no such file|format EPS"):
                use(source if use is not Video else [source])


def test_a_tile_larger_than_its_image_is_not_unpacked():
    tile = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found = np.asarray(fetch_image(tiff(8, 16, tile.tobytes())))
    assert np.array_equal(found[..., 0], tile[:8, :8])
    with pytest.raises(ValueError, match="tiles of 4096 x 4096 pixels, beyond its own size"):
        fetch_image(tiff(1, 4096, bytes(4096 * 4096)))


def test_pages_of_another_size_are_no_frames():
    pages = saved(noise((8, 6)), "TIFF", save_all=True, append_images=[coloured("red", (3000, 3000))])
    assert [frame.size for frame in fetch_frames(pages, policy=ImagePolicy(max_pixels=100))] == [(8, 6)]


def test_a_list_of_frames_is_limited_as_an_animation_is():
    pixel = coloured("red", (1, 1))
    assert len(Video([pixel] * POLICY.max_frames).frames) == POLICY.max_frames
    with pytest.raises(ValueError, match="more than 1024 frames of 1 x 1 pixels; the limits are 1024 frames"):
        Video([pixel] * (POLICY.max_frames + 1))
    opened = []
    frames = (opened.append(number) or coloured("red", (10, 10)) for number in range(99))
    with pytest.raises(ValueError, match="more than 4 frames of 10 x 10 pixels; .* and 400 pixels in all"):
        limited_frames(frames, ImagePolicy(max_video_pixels=400))
    assert len(opened) == 5  # and the others not at all


def test_a_text_of_white_space_is_judged_in_one_pass():
    """A pattern that tries each way to part it would take hours."""
    assert not is_base64("a" + " " * 1_000_000 + "!")
    encoded = base64.encodebytes(saved(noise((40, 40)), "PNG")).decode()  # in lines
    assert "\n" in encoded.strip() and is_base64(encoded) and fetch_image(encoded).size == (40, 40)


def test_an_image_of_millions_of_parts_is_left_after_some_seconds():
    start = saved(noise((8, 6)), "PNG")
    empty = struct.pack(">I4sI", 0, b"abCd", zlib.crc32(b"abCd"))  # a chunk that says nothing
    parts = start[:33] + empty * 100_000 + start[33:]
    assert fetch_image(parts).tobytes() == fetch_image(start).tobytes()
    with pytest.raises(ValueError, match="takes longer than 0.001 seconds to read"):
        fetch_image(parts, policy=ImagePolicy(max_decode_seconds=0.001))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="there is no /proc")
def test_files_without_a_size_are_not_opened():
    with pytest.raises(ValueError, match=r"empty \(0 bytes\)"):
        fetch_image("/proc/self/status")


def test_reading_in_threads_leaves_the_warnings_as_they_are():
    class Waits(io.BytesIO):
        def __init__(self, content):
            super().__init__(content)
            self.begun, self.go = threading.Event(), threading.Event()

        def read(self, *arguments):
            self.begun.set()
            assert self.go.wait(60)
            return super().read(*arguments)

    before, sources = list(warnings.filters), [Waits(saved(noise((4, 4)), "PNG")) for _ in range(2)]
    threads = [threading.Thread(target=fetch_image, args=(source,)) for source in sources]
    for thread, source in zip(threads, sources):
        thread.start()
        assert source.begun.wait(60)
    for thread, source in zip(threads, sources):  # the first begun ends first
        source.go.set()
        thread.join()
    assert warnings.filters == before


def fuzz(seed, count):
    pytest.importorskip("resource")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, FUZZ, str(seed), str(count)], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "'read'" in ran.stdout and "'refused'" in ran.stdout


def test_damaged_images_are_read_or_refused_in_a_line():
    fuzz(seed=0, count=50)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 3))
def test_many_damaged_images_are_read_or_refused_in_a_line(seed):
    fuzz(seed, count=3000)
