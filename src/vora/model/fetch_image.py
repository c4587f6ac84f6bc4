"""The one policy for images from outside: which sources, formats and sizes are opened, and nothing else.

It starts no program, and reaches nothing of the network but public hosts over http(s), and those only where the
caller allows URLs.
"""

import base64
import http.client
import io
import ipaddress
import math
import os
import re
import socket
import ssl
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

import numpy as np
from PIL import Image, ImageFile, ImageSequence, UnidentifiedImageError

from .to_rgb import from_array, to_rgb

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # PIL reads these by itself, no program helps
ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")  # a TIFF's pages and a camera's previews are no frames
BASE64 = re.compile(r"[A-Za-z0-9+/]+=*")  # the white space taken out
LONGEST_PATH = 260
MAX_TILE_PIXELS = 2048 * 2048
ENCODED = (str, os.PathLike, bytes, bytearray, memoryview, Mapping)  # or what has a method `read`
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # of a segment: neither an escaped FF nor a restart
NAT64 = ipaddress.ip_network("64:ff9b::/96")
URLS_ARE_OFF = "it is a URL, and data.allow_urls or image_processor.allow_urls is false"


@dataclass(frozen=True)
class ImagePolicy:
    """The limits. `allow_private` is for servers of one's own, such as a test's; no file or prompt can set it."""

    max_bytes: int = 100_000_000  # of a file as it is stored or sent
    max_pixels: int = 120_000_000  # above most cameras; takes at most 2 GB of memory
    max_frames: int = 1024
    max_video_pixels: int = 250_000_000  # of all frames: 1 GB
    max_jpeg_scans: int = 100  # cameras and web pages write about ten; each is a pass over all pixels
    max_decode_seconds: float = 20.0  # of a processor, to read one image
    max_seconds: float = 30.0  # of a whole download, redirects included
    max_redirects: int = 4
    allow_private: bool = False


POLICY = ImagePolicy()


def fetch_image(source: Any, *, allow_urls: bool = False, policy: ImagePolicy = POLICY) -> Image.Image:
    """An RGB image from whatever people have (`to_rgb`), of an animation the first frame.

    Args:
        source: PIL image, array [H, W], [H, W, C] or [C, H, W] of 0..255 or 0..1, encoded bytes, binary file object,
            path, `file://` address, base64 string, data URL, http(s) URL, or a dict of `datasets` (bytes, path).
        allow_urls: whether http(s) URLs are opened: only where a person asked for it, not since a file holds one.

    Raises:
        ValueError: the image is missing, damaged, or outside the policy; the message names it and the cause.
    """
    with _named(source, "image", "Give a readable image, or leave it out."):
        if not (isinstance(source, ENCODED + (Image.Image,)) or hasattr(source, "read")):
            return to_rgb(from_array(np.asarray(source)))
        with _opened(source, allow_urls, policy) as image:
            return to_rgb(image)


def fetch_frames(source: Any, *, allow_urls: bool = False, policy: ImagePolicy = POLICY) -> list[Image.Image]:
    """All frames of an animated image as RGB images, of another that one; ValueError as of `fetch_image`, and for too
    many frames or pixels in all."""
    cure = "Give its frames as a list of images, or an animated GIF, WebP or PNG."
    with _named(source, "video", cure), _opened(source, allow_urls, policy) as image:
        return limited_frames(map(to_rgb, ImageSequence.Iterator(image) if _moves(image) else [image]), policy)


def limited_frames(frames: Iterable[Image.Image], policy: ImagePolicy = POLICY) -> list[Image.Image]:
    """The frames of a video as they come; ValueError where they are too many, or their pixels in all."""
    found: list[Image.Image] = []
    left = policy.max_video_pixels
    for frame in frames:
        left -= frame.width * frame.height
        if len(found) == policy.max_frames or left < 0:
            raise ValueError(
                f"it has more than {len(found)} frames of {frame.width} x {frame.height} pixels; the limits are "
                f"{policy.max_frames} frames and {policy.max_video_pixels} pixels in all"
            )
        found.append(frame)
    return found


def is_animated(path: str | os.PathLike) -> bool:
    """Whether a path is that of an animation; a URL, or what cannot be read, is none."""
    with suppress(Exception), _opened(local_path(os.fspath(path)), False, POLICY) as image:
        return _moves(image)
    return False


def _moves(image: Image.Image) -> bool:
    return image.format in ANIMATED and getattr(image, "is_animated", False)


def is_base64(text: str) -> bool:
    """Whether a text is base64 and no path: it is longer than paths are, or holds what PIL knows as an image."""
    if not BASE64.fullmatch("".join(text.split())) or os.path.isfile(text):
        return False
    with suppress(Exception):  # PIL's decoders raise many kinds
        return len(text) > LONGEST_PATH or bool(_decoder(base64.b64decode(text), POLICY))
    return False


@contextmanager
def _named(source: Any, kind: str, cure: str) -> Iterator[None]:
    """Turns whatever goes wrong within into a ValueError of one line that names the source."""
    try:
        yield
        return
    except UnidentifiedImageError:
        cause = f"it is not an image of a known format ({', '.join(FORMATS)})"
    except FileNotFoundError:
        cause = "there is no such file"
    except Exception as error:  # PIL's decoders and the network raise many kinds
        cause = " ".join(str(error).split())[:400] or type(error).__name__
    raise ValueError(f"Cannot read {kind} {_name_of(source)}: {cause}. {cure}") from None


def _name_of(source: Any) -> str:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"of {len(source)} bytes"
    if isinstance(source, Mapping):
        source = source.get("path") or source.get("url") or source
    if not isinstance(source, (str, os.PathLike)):
        source = getattr(source, "filename", "") or type(source).__name__
    return "".join(one if one.isprintable() else " " for one in str(source)[:200])


@contextmanager
def _opened(source: Any, allow_urls: bool, policy: ImagePolicy) -> Iterator[Image.Image]:
    """A source as PIL opens it, its pixels not decoded yet. A PIL image that is given stays open."""
    given = isinstance(source, Image.Image)
    image = source if given else _decoder(_content_of(source, allow_urls, policy), policy)
    if isinstance(image, ImageFile.ImageFile) and image.format not in (*FORMATS, "MPO"):
        raise ValueError(f"it is a file of the format {image.format}: decode it first, image.convert('RGB')")
    if image.width * image.height > policy.max_pixels:  # a file of a few kB can claim gigabytes
        raise ValueError(f"it has {image.width} x {image.height} pixels, more than the limit of {policy.max_pixels}")
    tile = [getattr(image, "tag_v2", {}).get(tag, 1) for tag in (322, 323)]  # a TIFF's: each is decoded as a whole
    if math.prod(tile) > max(image.width * image.height, MAX_TILE_PIXELS):
        raise ValueError(f"it is a TIFF in tiles of {tile[0]} x {tile[1]} pixels, beyond its own size")
    with nullcontext(image) if given else image:
        yield image


class _Timed(io.BytesIO):
    """An image's bytes, read for so many seconds of this thread: millions of empty parts are more than one wants."""

    def __init__(self, content: bytes, seconds: float):
        super().__init__(content)
        self.seconds, self.end = seconds, time.thread_time() + seconds

    def read(self, size: int | None = -1) -> bytes:
        if time.thread_time() > self.end:
            raise ValueError(f"it takes longer than {self.seconds:g} seconds to read")
        return super().read(size)


def _decoder(content: bytes, policy: ImagePolicy) -> Image.Image:
    if not content:
        raise ValueError("it is empty (0 bytes)")
    if content.startswith(b"\xff\xd8"):
        _check_scans(content, policy)
        content = _without_cut_exif(content)
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    return Image.open(_Timed(content, policy.max_decode_seconds), formats=known)


def _without_cut_exif(content: bytes) -> bytes:
    """A JPEG in which an EXIF block without its head is none: PIL would take it for no image at all."""
    place = content.find(b"Exif\0\0", 0, 1 << 16)
    size = int.from_bytes(content[place - 2 : place], "big") - 8
    if place < 0 or (size >= 8 and content[place + 6 : place + 10] in (b"II*\0", b"MM\0*")):
        return content
    return content[:place] + b"-" + content[place + 1 :]


def _check_scans(content: bytes, policy: ImagePolicy) -> None:
    """Of a progressive JPEG each scan passes over all pixels: thousands in a small file take minutes."""
    place, scans = 2, 0
    for _ in range(10_000):  # segments
        found = JPEG_MARKER.search(content, place)
        if found is None or found[0] == b"\xff\xd9":  # the end of the image
            return
        scans += found[0] == b"\xff\xda"
        if scans > policy.max_jpeg_scans:
            break
        place = found.end() + int.from_bytes(content[found.end() : found.end() + 2], "big")
    raise ValueError(f"it is a JPEG of more than {policy.max_jpeg_scans} scans, or of 10,000 segments")


def _content_of(source: Any, allow_urls: bool, policy: ImagePolicy) -> bytes:
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path") or source.get("url") or b""
    if isinstance(source, (str, os.PathLike)):
        content = _content_at(os.fspath(source), allow_urls, policy)
    elif hasattr(source, "read"):
        content = source.read(policy.max_bytes + 1)
    else:
        content = bytes(source)
    if isinstance(content, str):
        raise ValueError("the file is open as text: open it with 'rb'")
    if len(content) > policy.max_bytes:
        raise ValueError(f"it is larger than the limit of {policy.max_bytes} bytes")
    return content


def _content_at(name: str, allow_urls: bool, policy: ImagePolicy) -> bytes:
    scheme = name.partition(":")[0].lower()
    if scheme in ("http", "https"):
        if not allow_urls:
            raise ValueError(URLS_ARE_OFF)
        return _downloaded(name, policy)
    if scheme == "data":
        head, _, encoded = name.partition(",")
        if not head.endswith(";base64"):
            raise ValueError("of data URLs only those in base64 are read")
        return base64.b64decode(encoded)
    path = local_path(name)
    if path == name and is_base64(name):
        return base64.b64decode(name)
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):  # opening a pipe or a device may already wait, or do something
        raise ValueError("it is no regular file")
    if not about.st_size:  # of /proc, too, where reading may wait
        return b""
    with open(path, "rb") as file:
        return file.read(policy.max_bytes + 1)


def local_path(name: str) -> str:
    """A path of a path or a `file://` address; ValueError of another address."""
    if "://" not in name:
        return name
    parts = urlsplit(name)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise ValueError("addresses other than file:///path, and http(s) where it is allowed, are not opened")
    return unquote(name[len("file://") + len(parts.netloc) :])


def _downloaded(url: str, policy: ImagePolicy) -> bytes:
    """The bytes at a URL. Redirects are followed by hand, for each may lead to a host of the own network."""
    deadline = time.monotonic() + policy.max_seconds
    for _ in range(policy.max_redirects + 1):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"it leads to {url[:100]}, which is no http(s) URL")
        try:
            redirect, content = _answer(parts, parts.hostname, deadline, policy)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() < deadline:
                given, cause = isinstance(error, ValueError), str(error) or type(error).__name__
                raise ValueError(cause if given else f"the server cannot be reached ({cause})") from None
        if time.monotonic() >= deadline:  # the connection was cut then, and what came may be a part
            raise ValueError(f"the server took longer than {policy.max_seconds:g} seconds")
        if redirect is None:
            return content
        url = urljoin(url, redirect)
    raise ValueError(f"it redirects more than {policy.max_redirects} times")


def _answer(parts: SplitResult, host: str, deadline: float, policy: ImagePolicy) -> tuple[str | None, bytes]:
    """(where a URL redirects to, its content), one of them."""
    is_https = parts.scheme == "https"
    connection = http.client.HTTPConnection(host, parts.port or (443 if is_https else 80))
    connection.default_port = 443 if is_https else 80  # for the header Host
    channel: Any = _connected(host, connection.port, deadline, policy)
    if is_https:
        context = ssl.create_default_context()
        channel = context.wrap_socket(channel, server_hostname=host, do_handshake_on_connect=False)
    connection.sock = channel
    # a timeout of the socket would begin anew with each byte that a slow server sends
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), _hang_up, [channel])
    timer.daemon = True
    timer.start()
    try:
        if is_https:
            channel.do_handshake()
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"User-Agent": "vora", "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}
        connection.request("GET", quote(target, safe="/%:=&+!$,;'@()*~?[]|"), headers=headers)
        with connection.getresponse() as response:
            redirect = response.headers.get("Location") if response.status in (301, 302, 303, 307, 308) else None
            if redirect is None and response.status != 200:
                raise ValueError(f"the server answers {response.status} {response.reason}")
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise ValueError("the server compresses it, though it was asked not to")  # to unpack gigabytes, say
            content = b"" if redirect else response.read(policy.max_bytes + 1)
            if not redirect and response.length and len(content) <= policy.max_bytes:  # more was announced
                raise ValueError("the server hung up in the middle")
            return redirect, content
    finally:
        timer.cancel()
        connection.close()


def _connected(host: str, port: int, deadline: float, policy: ImagePolicy) -> socket.socket:
    """A connection to a host, all of whose addresses must be public ones. It goes to an address that was checked, so
    that no second look-up of the name, and no proxy, can lead elsewhere."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not policy.allow_private and (private := [one for one in addresses if not is_public(one)]):
        raise ValueError(f"{host} is at {private[0]}, an address of a private, local or reserved network")
    for address in addresses:
        try:
            return socket.create_connection((address, port), timeout=max(0.01, deadline - time.monotonic()))
        except OSError as error:
            cause = error
    raise cause


def _hang_up(channel: socket.socket) -> None:
    with suppress(OSError):  # it is closed already
        socket.socket.shutdown(channel, socket.SHUT_RDWR)  # of TLS, too, without a farewell that could wait


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet, and not to this machine, its network, or to nobody."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if found.teredo or found.is_site_local:
            return False
        inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF) if found in NAT64 else None
        if (inner := inner or found.ipv4_mapped or found.sixtofour) is not None:
            return is_public(str(inner))
    return found.is_global and not (found.is_multicast or found.is_reserved)
