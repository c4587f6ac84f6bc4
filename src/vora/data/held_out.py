"""Which samples are held out of training, to be measured: whole images, by seed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vora.data.images import REMOTE
from vora.data.schema import Sample
from vora.model.fetch_image import is_base64


@dataclass(frozen=True)
class HeldOut:
    """A share of all images, chosen by seed, and so of the rows that show them. An image is known by the name of its
    file, wherever that lies, or by its content; a row without images by its text."""

    share: float
    seed: int

    def holds(self, sample: Sample) -> bool | None:
        """True of a sample whose images are all held out, False where none is; None where some are: it is neither
        trained nor measured."""
        return self.holds_images(sample.images) if sample.images else self._holds(str(sample.conversations).encode())

    def holds_images(self, images: Sequence[Any]) -> bool | None:
        """`holds` of a sample with these images."""
        found = {self._holds(key_of_image(image)) for image in images}
        return found.pop() if len(found) == 1 else None

    def _holds(self, key: bytes) -> bool:
        digest = hashlib.blake2b(key, digest_size=8, key=str(self.seed).encode()).digest()
        return int.from_bytes(digest, "big") / 2**64 < self.share  # where it stands between 0 and 1


def key_of_image(image: Any) -> bytes:
    """What is the same for the same image; a video is known by its first frame. ValueError where it is none."""
    if isinstance(image, list) and image:
        return key_of_image(image[0])
    if isinstance(image, Image.Image):
        return repr(image.size).encode() + image.tobytes()
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        raise ValueError(f"One of its images is a {type(image).__name__}, and none that is known.")
    return (image if image.startswith(REMOTE) or is_base64(image) else Path(image).name).encode()
