"""The one policy for images from outside: which sources, formats and sizes are opened, and nothing else.

A processor opens images wherever it runs, so this file ships with every checkpoint. It starts no program, and of the
network it reaches public hosts over http(s), and those only where the caller allows URLs.
"""

import base64
import http.client
import io
import ipaddress
import os
import re
import socket
import ssl
import stat
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

import numpy as np
from PIL import Image, ImageFile, ImageSequence, UnidentifiedImageError

from .to_rgb import from_array, to_rgb

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # PIL reads these by itself, no program helps
ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")  # a TIFF's pages and a camera's previews are no frames
BASE64 = re.compile(r"[A-Za-z0-9+/\s]+=*\s*")
LONGEST_PATH = 260
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # of a segment: neither an escaped FF nor a restart
NAT64 = ipaddress.ip_network("64:ff9b::/96")
URLS_ARE_OFF = (
    "it is a URL, and URLs are opened only where you ask for it (in a recipe data.allow_urls: true, of a processor "
    "processor.image_processor.allow_urls = True)"
)


@dataclass(frozen=True)
class ImagePolicy:
    """The limits. `allow_private` is for servers of one's own, such as a test's; no file or prompt can set it."""

    max_bytes: int = 100_000_000  # of a file as it is stored or sent
    max_pixels: int = 120_000_000  # above the largest cameras; PIL's own limit holds besides
    max_frames: int = 1024
    max_video_pixels: int = 500_000_000  # of all frames: 1.5 GB as RGB
    max_jpeg_scans: int = 100  # cameras and web pages write about ten; each is a pass over all pixels
    max_seconds: float = 30.0  # of a whole download, redirects included
    max_redirects: int = 4
    allow_private: bool = False


POLICY = ImagePolicy()


def fetch_image(source: Any, *, allow_urls: bool = False, policy: ImagePolicy = POLICY) -> Image.Image:
    """An RGB image from whatever people have.

    EXIF rotation is applied, transparency laid on white, 16-bit grey scaled to 8 bits, CMYK converted, and of an
    animation the first frame taken.

    Args:
        source: PIL image, array [H, W], [H, W, C] or [C, H, W] of 0..255 or 0..1, encoded bytes, binary file object,
            path, `file://` address, base64 string, data URL, http(s) URL, or a dict of `datasets` (bytes, path).
        allow_urls: whether http(s) URLs are opened: only where a person asked for it, not since a file holds one.
        policy: the limits.

    Raises:
        ValueError: the image is missing, damaged, or outside the policy; the message names it and the cause.
    """
    with _named(source, "image", "Give a readable image, or leave it out."):
        if _is_array(source):
            return to_rgb(from_array(np.asarray(source)))
        with _opened(source, allow_urls, policy) as image:
            _check_pixels(image, policy)
            image.load()  # also tells whether it is whole
            return to_rgb(image)


def fetch_frames(source: Any, *, allow_urls: bool = False, policy: ImagePolicy = POLICY) -> list[Image.Image]:
    """All frames of an animated image as RGB images; of another image that one.

    Args:
        source, allow_urls, policy: see `fetch_image`.

    Raises:
        ValueError: as `fetch_image`, and for too many frames or pixels in all.
    """
    cure = "Give its frames as a list of images, or an animated GIF, WebP or PNG."
    with _named(source, "video", cure), _opened(source, allow_urls, policy) as animation:
        _check_pixels(animation, policy)
        frames = []
        for frame in ImageSequence.Iterator(animation):
            pixels = frame.width * frame.height * (len(frames) + 1)
            if len(frames) == policy.max_frames or pixels > policy.max_video_pixels:
                raise ValueError(
                    f"it has more than {len(frames)} frames of {frame.width} x {frame.height} pixels; the limits are "
                    f"{policy.max_frames} frames and {policy.max_video_pixels} pixels in all"
                )
            frames.append(to_rgb(frame.copy()))
        return frames


def is_animated(path: str | os.PathLike) -> bool:
    """Whether a path is that of an animation; a URL, or what cannot be read, is none."""
    try:
        with _opened(_local_path(os.fspath(path)), False, POLICY) as image:
            return image.format in ANIMATED and getattr(image, "n_frames", 1) > 1
    except Exception:  # PIL's decoders raise many kinds
        return False


def is_base64(text: str) -> bool:
    """Whether a text is base64 and no path: it is longer than paths are, or holds what PIL knows as an image."""
    if not BASE64.fullmatch(text) or os.path.isfile(text):
        return False
    if len(text) > LONGEST_PATH:
        return True
    try:
        _decoder(base64.b64decode(text), POLICY).close()
        return True
    except Exception:  # PIL's decoders raise many kinds
        return False


@contextmanager
def _named(source: Any, kind: str, cure: str) -> Iterator[None]:
    """Turns whatever goes wrong within into a ValueError of one line that names the source."""
    try:
        with warnings.catch_warnings():
            # PIL's remarks on palettes and EXIF are handled here, and `_check_pixels` refuses where it would warn
            warnings.simplefilter("ignore")
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
    given = isinstance(source, (str, os.PathLike))
    return str(source if given else getattr(source, "filename", "") or type(source).__name__)[:200]


def _is_array(source: Any) -> bool:
    known = isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview, Mapping, Image.Image))
    return not known and not hasattr(source, "read")


@contextmanager
def _opened(source: Any, allow_urls: bool, policy: ImagePolicy) -> Iterator[Image.Image]:
    """A source as PIL opens it, its pixels not decoded yet. A PIL image that is given stays open."""
    if isinstance(source, Image.Image):
        if isinstance(source, ImageFile.ImageFile) and source.format not in (*FORMATS, "MPO"):
            raise ValueError(f"it is a file of the format {source.format}: decode it first, image.convert('RGB')")
        yield source
        return
    with _decoder(_content_of(source, allow_urls, policy), policy) as image:
        yield image


def _decoder(content: bytes, policy: ImagePolicy) -> Image.Image:
    if not content:
        raise ValueError("it is empty (0 bytes)")
    if content.startswith(b"\xff\xd8"):
        _check_scans(content, policy)
    Image.init()
    return Image.open(io.BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN])


def _check_pixels(image: Image.Image, policy: ImagePolicy) -> None:
    """Before they are decoded: a file of a few kB can claim gigabytes."""
    if image.width * image.height > policy.max_pixels:
        raise ValueError(f"it has {image.width} x {image.height} pixels, more than the limit of {policy.max_pixels}")


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


# From sources to bytes


def _content_of(source: Any, allow_urls: bool, policy: ImagePolicy) -> bytes:
    """The encoded bytes of an image that is none in memory yet."""
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path") or source.get("url")
        if source is None:
            raise ValueError("it has neither bytes nor a path")
    if isinstance(source, (str, os.PathLike)):
        return _content_at(os.fspath(source), allow_urls, policy)
    content = source.read(policy.max_bytes + 1) if hasattr(source, "read") else bytes(source)
    if isinstance(content, str):
        raise ValueError("the file is open as text: open it with 'rb'")
    return _checked_size(content, policy)


def _content_at(name: str, allow_urls: bool, policy: ImagePolicy) -> bytes:
    scheme = name.partition(":")[0].lower()
    if scheme == "data":
        head, comma, encoded = name.partition(",")
        if not comma or not head.endswith(";base64"):
            raise ValueError("of data URLs only those in base64 are read")
        return _checked_size(base64.b64decode(encoded), policy)
    if scheme in ("http", "https"):
        if not allow_urls:
            raise ValueError(URLS_ARE_OFF)
        return _downloaded(name, policy)
    path = _local_path(name)
    if path == name and is_base64(name):
        return _checked_size(base64.b64decode(name), policy)
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe or a device may already wait, or do something
        raise ValueError("it is no regular file")
    with open(path, "rb") as file:
        return _checked_size(file.read(policy.max_bytes + 1), policy)


def _local_path(name: str) -> str:
    if "://" not in name:
        return name
    parts = urlsplit(name)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise ValueError("addresses other than file:///path, and http(s) where it is allowed, are not opened")
    return unquote(name[len("file://") + len(parts.netloc) :])


def _checked_size(content: bytes, policy: ImagePolicy) -> bytes:
    if len(content) > policy.max_bytes:
        raise ValueError(f"it is larger than the limit of {policy.max_bytes} bytes")
    return content


# From the network


def _downloaded(url: str, policy: ImagePolicy) -> bytes:
    """The bytes at a URL. Redirects are followed by hand, for each may lead to a host of the own network."""
    deadline = time.monotonic() + policy.max_seconds
    for _ in range(policy.max_redirects + 1):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"it leads to {url[:100]}, which is no http(s) URL")
        try:
            redirect, content = _answer(parts, deadline, policy)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= deadline:  # the cause is that the connection was cut then
                raise ValueError(f"the server took longer than {policy.max_seconds:g} seconds") from None
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"the server cannot be reached ({str(error) or type(error).__name__})") from None
        if time.monotonic() >= deadline:  # what came until then may be a part
            raise ValueError(f"the server took longer than {policy.max_seconds:g} seconds")
        if redirect is None:
            return content
        url = urljoin(url, redirect)
    raise ValueError(f"it redirects more than {policy.max_redirects} times")


def _answer(parts: SplitResult, deadline: float, policy: ImagePolicy) -> tuple[str | None, bytes]:
    """(where a URL redirects to, its content), one of them.

    The connection goes to the address that was checked, so that no second look-up of the name can lead elsewhere. For
    the same reason the proxies that the environment names are not used.
    """
    is_https = parts.scheme == "https"
    standard_port = 443 if is_https else 80
    port = parts.port or standard_port
    channel = _connected(parts.hostname, port, deadline, policy)
    if is_https:
        context = ssl.create_default_context()
        channel = context.wrap_socket(channel, server_hostname=parts.hostname, do_handshake_on_connect=False)
    connection = http.client.HTTPConnection(parts.hostname, port)
    connection.sock, connection.default_port = channel, standard_port  # the latter for the header Host
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
            if response.status in (301, 302, 303, 307, 308) and (redirect := response.headers.get("Location")):
                return redirect, b""
            return None, _body_of(response, policy)
    finally:
        timer.cancel()
        connection.close()


def _connected(host: str, port: int, deadline: float, policy: ImagePolicy) -> socket.socket:
    """A connection to a host, all of whose addresses must be public ones.

    Names, numbers and forms such as 0x7f000001 or [::ffff:127.0.0.1] are checked by what they resolve to.
    """
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
    try:
        socket.socket.shutdown(channel, socket.SHUT_RDWR)  # of TLS, too, without a farewell that could wait
    except OSError:  # it is closed already
        pass


def _body_of(response: http.client.HTTPResponse, policy: ImagePolicy) -> bytes:
    if response.status != 200:
        raise ValueError(f"the server answers {response.status} {response.reason}")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ValueError("the server compresses it, though it was asked not to")  # a few kB may unpack to gigabytes
    if (response.length or 0) > policy.max_bytes:
        raise ValueError(f"it is larger than the limit of {policy.max_bytes} bytes")
    content = _checked_size(response.read(policy.max_bytes + 1), policy)
    if response.length:  # what is left to come
        raise ValueError("the server hung up in the middle")
    return content


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
