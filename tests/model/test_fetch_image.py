"""Images as people have them, and as people who mean harm have them."""

import base64
import io
import os
import re
import struct
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from messages import assistant, coloured, noise, user
from PIL import Image

from vora.model import fetch_image as module
from vora.model.fetch_image import ImagePolicy, fetch_frames, fetch_image, is_public

NOISE = noise((64, 48))


def saved(image, kind, **kwargs):
    stream = io.BytesIO()
    image.save(stream, kind, **kwargs)
    return stream.getvalue()


def refused(source, use=fetch_image, **kwargs):
    """The message of the ValueError; one line."""
    with pytest.raises(ValueError) as caught:
        use(source, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


BAD = {
    "missing.png": (None, "no such file"),
    "empty.png": (b"", "empty (0 bytes)"),
    "truncated.jpg": (saved(NOISE, "JPEG")[:900], "truncated"),
    "truncated.png": (saved(NOISE, "PNG")[:900], ""),
    "header_only.gif": (b"GIF89a", ""),
    "text.png": (b"hello, this is no image", "not an image of a known format"),
    "script.png": (saved(coloured("red"), "EPS"), "not an image of a known format"),  # PIL would start Ghostscript
    "icon.png": (saved(coloured("red", (16, 16)), "ICO"), "not an image of a known format"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_with_cause_and_cure(processor, tmp_path, name):
    content, cause = BAD[name]
    path = str(tmp_path / name)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    learnable = [user(Path(path)), assistant("red")]
    uses = {fetch_image: path, processor.image_processor: path, processor.training_sample: learnable}
    for use, source in uses.items():
        message = refused(source, use)
        assert name in message and cause in message and "Give a readable image" in message
    # images that are open already are judged alike; PIL notices at the pixels that one is truncated
    assert "truncated" in refused(Image.open(io.BytesIO(BAD["truncated.jpg"][0])))
    assert "format EPS" in refused(Image.open(io.BytesIO(BAD["script.png"][0])))


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path, tmp_path / "pipe.png", "/dev/zero", f"file://{tmp_path}/pipe.png"):
        assert "no regular file" in refused(path)
    coloured("red").save(tmp_path / "a b.png")
    for place in (f"{tmp_path}/a b.png", f"{tmp_path}/a%20b.png", f"localhost{tmp_path}/a b.png"):
        assert fetch_image(f"file://{place}").getpixel((0, 0)) == (255, 0, 0)
    for address in (f"file://elsewhere{tmp_path}/a b.png", "ftp://x.org/a.png", "data:image/png,abc"):
        assert "not opened" in refused(address) or "base64" in refused(address)


def test_every_source_of_bytes_is_read_alike(tmp_path):
    image = noise((20, 10))
    content, path = saved(image, "PNG"), tmp_path / "a.png"
    path.write_bytes(content)
    encoded = base64.b64encode(content).decode()
    with open(path, "rb") as file, open(path, encoding="latin-1") as text:
        for source in (
            content, bytearray(content), memoryview(content), io.BytesIO(content), path, str(path), image, encoded,
            f"data:image/png;base64,{encoded}", {"bytes": content, "path": None}, {"bytes": None, "path": str(path)},
            file,
        ):  # fmt: skip
            assert fetch_image(source).tobytes() == image.tobytes()
        assert "'rb'" in refused(text)
    assert "0 bytes" in refused({"bytes": None, "path": None})


def test_short_base64_is_an_image_unless_it_is_a_file(tmp_path, monkeypatch):
    encoded = base64.b64encode(saved(coloured("red", (4, 4)), "BMP")).decode()
    assert len(encoded) < 200
    assert fetch_image(encoded).getpixel((0, 0)) == (255, 0, 0)
    monkeypatch.chdir(tmp_path)
    coloured("blue").save(encoded[:20], "PNG")
    assert fetch_image(encoded[:20]).getpixel((0, 0)) == (0, 0, 255)
    assert "abcd: there is no such file" in refused("abcd")


def test_limits_hold_before_pixels_are_decoded(tmp_path, monkeypatch):
    """Of bytes and of pixels; what lies at the limit is read."""
    content, path = saved(noise((30, 20)), "PNG"), tmp_path / "a.png"
    path.write_bytes(content)
    fetch_image(content, policy=ImagePolicy(max_bytes=len(content), max_pixels=600))
    for source in (content, path, io.BytesIO(content), base64.b64encode(content).decode()):
        assert f"limit of {len(content) - 1} bytes" in refused(source, policy=ImagePolicy(max_bytes=len(content) - 1))
    monkeypatch.setattr(Image.Image, "load", None)  # decoding would fail otherwise
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    assert "30 x 20 pixels, more than the limit of 599" in refused(content, policy=ImagePolicy(max_pixels=599))


def test_frames_of_an_animation_are_limited():
    first, *rest = (noise((8, 8 + n)).resize((8, 8)) for n in range(4))
    film = saved(first, "GIF", save_all=True, append_images=rest)
    assert len(fetch_frames(film, policy=ImagePolicy(max_frames=4, max_video_pixels=256))) == 4
    for policy in (ImagePolicy(max_frames=3), ImagePolicy(max_video_pixels=100)):
        message = refused(film, fetch_frames, policy=policy)
        assert re.match("Cannot read video of .* bytes: it has more than . frames of 8 x 8 pixels", message)


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once():
    content = saved(NOISE, "JPEG", progressive=True)
    start, end = content.index(b"\xff\xda"), content.rindex(b"\xff\xd9")
    thumbnails = content[:2] + b"\xff\xe1\x00\xca" + b"\xff\xda" * 100 + content[2:]  # in a segment, no scans
    trailing = content + b"\xff\xda" * 200  # a camera's film after the image
    for fine in (thumbnails, trailing):
        assert fetch_image(fine).tobytes() == fetch_image(content).tobytes()
    scans = content[start:end]
    bomb = content[:start] + scans * (101 // scans.count(b"\xff\xda") + 1) + content[end:]
    assert "more than 100 scans" in refused(bomb)
    assert "segments" in refused(content[:2] + b"\xff\xfe\x00\x02" * 10_001 + content[2:])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_damaged_exif_leaves_the_image_readable(kind):
    tag = struct.pack("<HHII", 0x0112, 3, 1, 6)
    damaged = {
        b"garbage here": (6, 4),
        b"": (6, 4),
        b"I": (6, 4),
        b"MM\0*\0\0": (6, 4),
        b"II*\0\x08\0\0\0\x05\0\x12\x01": (6, 4),
        b"II*\0\xff\xff\xff\x7f": (6, 4),
        b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI4s", 0x0112, 2, 4, b"abc\0") + bytes(4): (6, 4),
        # one entry points nowhere, but the orientation can be read
        b"II*\0\x08\0\0\0\x02\0" + tag + struct.pack("<HHII", 0x8769, 4, 1, 2**31 - 1) + bytes(4): (4, 6),
    }
    for exif, size in damaged.items():
        assert fetch_image(saved(noise((6, 4)), kind, exif=b"Exif\0\0" + exif)).size == size


TRANSPARENT = saved(coloured((0, 0, 0, 0), (8, 8), "RGBA"), "PNG")
DARK = saved(Image.fromarray(np.full((40, 40), 32768, dtype=np.uint16)), "PNG")


class Images(BaseHTTPRequestHandler):
    """Two images, addresses that have moved, and servers that do what they should not."""

    def do_GET(self):
        name = self.path.strip("/")
        content = {"transparent.png": TRANSPARENT, "dark%20one.png?size=4": DARK}.get(name, DARK[:50])
        moved = {"moved": "/dark one.png?size=4", "loop": "/loop", "file": "file:///etc/passwd"}.get(name)
        moved = name.removeprefix("to=") if name.startswith("to=") else moved
        self.send_response(302 if moved else 404 if name == "none" else 200)
        headers = {"Location": moved, "Content-Encoding": "gzip" if name == "zipped" else None}
        headers["Content-Length"] = {"long": "999999999", "cut": "5000"}.get(name)
        for key, value in headers.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        with suppress(OSError):  # nobody listens any more
            for _ in range(10_000 if name in ("slow", "endless") else 0):
                self.wfile.write(b"." * (1 if name == "slow" else 1000))
                time.sleep(0.02 if name == "slow" else 0)
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Images)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


HERE = {"allow_urls": True, "policy": ImagePolicy(allow_private=True, max_bytes=10_000, max_seconds=0.5)}


def test_images_at_urls_are_what_they_are_in_files(address):
    for name, content in {"transparent.png": TRANSPARENT, "dark one.png?size=4": DARK, "moved": DARK}.items():
        assert fetch_image(f"{address}/{name}", **HERE).tobytes() == fetch_image(content).tobytes()


@pytest.mark.parametrize("kind", ["image", "image_url", "video"])
def test_urls_are_off_unless_asked_for(address, processor, kind, monkeypatch):
    url = f"{address}/transparent.png"
    part = {"type": kind, "image_url": {"url": url}} if kind == "image_url" else {"type": kind, "url": url}
    messages = [{"role": "user", "content": [part]}]
    message = refused(messages, processor.apply_chat_template, tokenize=True)
    assert re.search(r"it is a URL.*data\.allow_urls.*image_processor\.allow_urls", message)
    monkeypatch.setattr(processor.image_processor, "allow_urls", True)
    message = refused(messages, processor.apply_chat_template, tokenize=True)
    assert "127.0.0.1, an address of a private, local or reserved network" in message
    assert "it is a URL" in refused(url, policy=HERE["policy"])


@pytest.mark.parametrize(
    "path, cause",
    [
        ("none", "the server answers 404 Not Found"), ("loop", "redirects more than 4 times"),
        ("file", "leads to file:///etc/passwd"), ("zipped", "compresses it"), ("long", "hung up in the middle"),
        ("cut", "hung up in the middle"), ("slow", "longer than 0.5 seconds"),
        ("endless", "larger than the limit of 10000 bytes"),
    ],
)  # fmt: skip
def test_servers_that_cannot_be_trusted_are_left(address, path, cause):
    started = time.monotonic()
    assert cause in refused(f"{address}/{path}", **HERE)
    assert time.monotonic() - started < 5


def test_each_redirect_is_checked_and_the_checked_address_is_the_one_connected_to(address, monkeypatch):
    """A name that is public when asked for first and this machine's afterwards does not get through."""
    asked = []

    def resolve(host, port, **kwargs):
        asked.append(host)
        found = {"public.test": "93.184.216.34", "inside.test": "10.0.0.7"}.get(host, host)
        return [(2, 1, 6, "", (found, port))]

    connected = []

    def connect(place, timeout):
        connected.append(place[0])
        return real_connect(("127.0.0.1", int(address.rpartition(":")[2])), timeout)

    real_connect = module.socket.create_connection
    fake = SimpleNamespace(**{**vars(module.socket), "getaddrinfo": resolve, "create_connection": connect})
    monkeypatch.setattr(module, "socket", fake)
    assert fetch_image("http://public.test/transparent.png", allow_urls=True).size == (8, 8)
    assert asked == ["public.test"] and connected == ["93.184.216.34"]
    for there in ("http://inside.test/a.png", "//127.0.0.1/a.png"):
        assert "an address of a private" in refused(f"http://public.test/to={there}", allow_urls=True)
    assert connected == ["93.184.216.34"] * 3


PUBLIC = "8.8.8.8 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808"
PRIVATE = """127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.1.1 100.64.0.1 0.0.0.0 224.0.0.1 240.0.0.1 192.0.2.1
    255.255.255.255 ::1 :: ::127.0.0.1 ::ffff:10.0.0.1 64:ff9b::7f00:1 2002:7f00:1:: 2001:0:1:: fe80::1%eth0 fc00::1
    fec0::1 ff02::1"""


def test_which_addresses_are_public():
    assert [address for address in f"{PUBLIC} {PRIVATE}".split() if is_public(address)] == PUBLIC.split()
    for host in "localhost 127.1 0x7f000001 2130706433 [::1] [::ffff:127.0.0.1] 0 169.254.169.254".split():
        assert "private, local or reserved network" in refused(f"http://{host}:9/a.png", allow_urls=True)


def test_a_name_stays_one_line_without_control_characters():
    with pytest.raises(ValueError, match=r"^Cannot read image a b \[2Jc\.png: there is no such file\.") as caught:
        fetch_image("a\nb\x1b[2Jc.png")
    assert str(caught.value).isprintable()
