"""Where the images of a row are: in which columns, as what, and from where paths start."""

import re
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from vora.data.columns import COLUMNS, IMAGE_COLUMNS, Row
from vora.model.fetch_image import fetch_image, is_base64, local_path
from vora.model.image_processing_vora import Video

# a list is a video, frame by frame
ImageSource: TypeAlias = "str | bytes | Image.Image | list[Any]"

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
UNREAD_ENDINGS = (
    "heic", "heif", "avif", "jxl", "jp2", "ppm", "npy", "mp4", "webm", "mov", "avi", "mkv", "mpeg", "mpg",
    "wav", "mp3", "flac", "ogg", "m4a",
)  # fmt: skip
MEDIA_NAMES = re.compile(
    r"(img|image|pic|photo|pixel|frame|video|clip|audio|sound|file_?name|jpe?g$|png$)", re.IGNORECASE
)
REMOTE = ("http://", "https://", "data:")


class VideoPath(str):
    """Where an animated image is of which all frames are meant."""


class VideoBytes(bytes):
    """An animated image of which all frames are meant."""


def open_source(source: ImageSource, allow_urls: bool = False) -> Image.Image | list[Image.Image]:
    """The RGB image of a source, of a video its frames; ValueError as `fetch_image`."""
    if isinstance(source, (list, VideoPath, VideoBytes)):
        return Video(source, allow_urls).frames
    return fetch_image(source, allow_urls=allow_urls)


def images_of_row(row: Row, image_folder: str | Path) -> list[ImageSource]:
    """What a row's columns of images hold, paths from where they start; else the image that `file_name` names, as in
    metadata.jsonl of the image folders of `datasets`. ValueError if one is empty, or it has images and videos."""
    columns = [column for column in IMAGE_COLUMNS if column in row]
    moving = [column for column in columns if column not in ("image", "images")]
    if 0 < len(moving) < len(columns):
        raise ValueError(
            f"It has images in {columns[0]!r} and a video in {moving[0]!r}, and nothing says which comes where: put "
            "them into its messages, or leave one of the columns out."
        )
    value, name = row[columns[0]] if columns else [], row.get("file_name")
    found = list(value) if isinstance(value, (list, tuple)) else [value]
    if columns[:1] == ["videos"]:
        found = [as_video(video) for video in found]
    elif columns[:1] == ["video"]:
        video = as_video(value)
        found = video if isinstance(video, list) else [video]
    elif not found and isinstance(name, str) and _ends_as(name, IMAGE_ENDINGS) and Path(image_folder, name).is_file():
        found = [name]
    return [located(image, image_folder) for image in found]


def located(image: Any, folder: str | Path) -> ImageSource:
    """An image as `open_source` takes it, of what a row holds: path, URL, base64, bytes, PIL image, or a dict as the
    Image feature of `datasets` or OpenAI's image_url; paths start at `folder`. ValueError if it is empty."""
    if isinstance(image, (list, tuple)):
        return [located(frame, folder) for frame in image]
    image = content_of(image)
    if image is None:
        raise ValueError("One of its images is empty.")
    if not isinstance(image, str) or image.startswith(REMOTE) or is_base64(image):
        return image
    path = local_path(image) if image.startswith(("file:///", "file://localhost/")) else image.removeprefix("file://")
    return type(image)(Path(folder) / path)  # an absolute path stays


def looks_like_media(column: str) -> bool:
    """Whether a column's name says that images are in it, though it is none of ours."""
    return column not in COLUMNS and MEDIA_NAMES.match(column) is not None


def check_unread_media(row: Row) -> None:
    """Raise ValueError for an image in a column that is none of ours: the row would be learned without it."""
    for column, value in row.items():
        if looks_like_media(str(column)) and is_media(value[0] if isinstance(value, list) and value else value):
            raise ValueError(
                f"Its column {column!r} seems to hold an image, but images are looked for in "
                f"{', '.join(IMAGE_COLUMNS)} alone: name it in the source's `columns`, image: {column}, or "
                f"with --column image={column}."
            )


def as_video(video: Any) -> Any:
    """One animated image, of which all frames are meant, or a list of frames."""
    if isinstance(video, (list, tuple)):
        if len(video) != 1 or (isinstance(video[0], str) and video[0].startswith(REMOTE)):
            return list(video)  # of one frame, where it is an address
        video = video[0]
    video = content_of(video)
    if isinstance(video, str):
        return VideoPath(video)
    if isinstance(video, Image.Image):
        return Video(video).frames
    video = video.read() if hasattr(video, "read") else video
    return VideoBytes(video) if isinstance(video, (bytes, bytearray, memoryview)) else video


def content_of(image: Any) -> Any:
    """What a dict of `datasets` or OpenAI's says of an image, None if nothing; anything else as it is."""
    return image.get("bytes") or image.get("path") or image.get("url") if isinstance(image, dict) else image


def is_media(value: Any) -> bool:
    if isinstance(value, str):
        return _ends_as(value, IMAGE_ENDINGS + UNREAD_ENDINGS) or value.startswith("data:image")
    return isinstance(value, bytes) or (isinstance(value, dict) and not {"bytes", "path", "url"}.isdisjoint(value))


def _ends_as(text: str, endings: tuple[str, ...]) -> bool:
    return text.partition("?")[0].lower().endswith(tuple(f".{ending}" for ending in endings))
