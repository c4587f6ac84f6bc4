"""Where the images of a row are: in which columns, as what, and from where paths start."""

import re
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from vora.data.columns import COLUMNS, IMAGE_COLUMNS, Row
from vora.model.fetch_image import fetch_image, is_base64
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
REMOTE = ("http://", "https://")
LONGEST_PATH = 250


class VideoPath(str):
    """Where an animated image is of which all frames are meant."""


class VideoBytes(bytes):
    """An animated image of which all frames are meant."""


def open_source(source: ImageSource, allow_urls: bool = False) -> "Image.Image | list[Image.Image]":
    """The RGB image of a source; of a video its frames.

    Raises:
        ValueError: it cannot be read, or it is at a URL and these are not allowed.
    """
    if isinstance(source, (list, VideoPath, VideoBytes)):
        return Video(source, allow_urls).frames
    return fetch_image(source, allow_urls=allow_urls)


def images_of_row(row: Row, image_folder: str | Path) -> list[ImageSource]:
    """What a row's columns of images hold, paths from where they start; else the image that `file_name` names, as in
    metadata.jsonl of the image folders of `datasets`.

    Raises:
        ValueError: an image is empty, or it has images and videos.
    """
    found = _in_columns(row)
    name = row.get("file_name")
    if not found and isinstance(name, str) and _ends_as(name, IMAGE_ENDINGS) and Path(image_folder, name).is_file():
        found = [name]
    return [located(image, image_folder) for image in found]


def has_images(row: Row) -> bool:
    """Whether a row has images in a column of their own."""
    return any(column in row for column in IMAGE_COLUMNS)


def located(image: Any, folder: str | Path) -> ImageSource:
    """An image as `open_source` takes it, of what a row holds: path, URL, base64, bytes, PIL image, or a dict as the
    Image feature of `datasets` or OpenAI's image_url; paths start at `folder`.

    Raises:
        ValueError: it is empty.
    """
    if isinstance(image, (list, tuple)):
        return [located(frame, folder) for frame in image]
    image = _content(image)
    if image is None:
        raise ValueError("One of its images is empty.")
    if not isinstance(image, str) or image.startswith((*REMOTE, "data:")):
        return image
    if len(image) > LONGEST_PATH or is_base64(image):
        return image
    return type(image)(Path(folder) / image.removeprefix("file://"))  # an absolute path stays


def as_video(video: Any) -> Any:
    """One animated image, of which all frames are meant, or a list of frames."""
    if isinstance(video, (list, tuple)) and len(video) != 1:
        return list(video)
    if isinstance(video, (list, tuple)):
        video = video[0]
        if isinstance(video, str) and video.startswith((*REMOTE, "data:")):
            return [video]  # one frame
    video = _content(video)
    if isinstance(video, str):
        return VideoPath(video)
    return VideoBytes(video) if isinstance(video, bytes) else video


def looks_like_media(column: str) -> bool:
    """Whether a column's name says that images are in it, though it is none of ours."""
    return column not in COLUMNS and MEDIA_NAMES.match(column) is not None


def check_unread_media(row: Row) -> None:
    """Raise ValueError for an image in a column that is none of ours: the row would be learned without it."""
    for column, value in row.items():
        if looks_like_media(str(column)) and _is_media(value[0] if isinstance(value, list) and value else value):
            raise ValueError(
                f"Its column {column!r} seems to hold an image, but images are looked for in "
                f"{', '.join(IMAGE_COLUMNS)} alone: name it in the source's `columns`, image: {column}."
            )


def _in_columns(row):
    columns = [column for column in IMAGE_COLUMNS if column in row]
    still = [column for column in columns if column in ("image", "images")]
    if 0 < len(still) < len(columns):
        moving = next(column for column in columns if column not in still)
        raise ValueError(
            f"It has images in {still[0]!r} and a video in {moving!r}, and nothing says which comes where: put them "
            "into its messages, or leave one of the columns out."
        )
    if not columns:
        return []
    value = row[columns[0]]
    if columns[0] == "videos":
        return [as_video(video) for video in (value if isinstance(value, (list, tuple)) else [value])]
    if columns[0] == "video":
        found = as_video(value)
        return found if isinstance(found, list) else [found]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _content(image):
    if isinstance(image, dict):
        return image.get("bytes") or image.get("path") or image.get("url")
    return image


def _is_media(value):
    if isinstance(value, str):
        return _ends_as(value, IMAGE_ENDINGS + UNREAD_ENDINGS) or value.startswith("data:image")
    return isinstance(value, bytes) or (isinstance(value, dict) and not {"bytes", "path", "url"}.isdisjoint(value))


def _ends_as(text, endings):
    return text.partition("?")[0].lower().endswith(tuple(f".{ending}" for ending in endings))
