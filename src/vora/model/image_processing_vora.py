"""PIL images to normalised patches and grids, each image at its own size.

Dims: P patches of all images, C channels, p patch side, N images.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import numpy as np
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from .fetch_image import ENCODED, fetch_frames, fetch_image, limited_frames

ALWAYS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")  # what other image processors can leave out
OTHERS = ("size", "crop_size", "rescale_factor")  # what further they can be given


class Video:
    """Frames that are one image of several times: `image_grid_thw` counts them, and each is a block of attention.

    Args:
        source: list of frames (anything `fetch_image` takes), array [T, H, W, 3], or an animated image: PIL image,
            path, URL, base64 string, bytes, file object or dict of `datasets`.

    Raises:
        ValueError: there are no frames, or one cannot be read.
    """

    is_video = True  # remote code is loaded file by file, and each file has a class `Video` of its own

    def __init__(self, source: Any, allow_urls: bool = False):
        if isinstance(source, ENCODED + (Image.Image,)) or hasattr(source, "read"):
            self.frames = fetch_frames(source, allow_urls=allow_urls)
        else:
            self.frames = limited_frames(fetch_image(frame, allow_urls=allow_urls) for frame in source)
        if not self.frames:
            raise ValueError("The video has 0 frames: give at least one.")

    height = property(lambda self: self.frames[0].height)
    width = property(lambda self: self.frames[0].width)


def on_black_square(image: Image.Image) -> Image.Image:
    """An RGB image in the middle of the smallest black square that holds it."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def fit_grid(
    height: int, width: int, token_size: int, min_image_tokens: int, max_image_tokens: int
) -> tuple[int, int]:
    """(rows, columns) of whole image tokens, of so many pixels each way, near an image's size and aspect ratio.

    The image's own size in tokens if that is within budget, else of the grids near the budget's bound the one nearest
    in aspect ratio and number of tokens. rows * columns <= max_image_tokens always, and >= min_image_tokens wherever
    a grid near is both (always where the budget spans a factor of two).
    """
    rows, columns = height / token_size, width / token_size
    own = max(1, round(rows)), max(1, round(columns))
    if min_image_tokens <= own[0] * own[1] <= max_image_tokens:
        return own
    bound = max_image_tokens if own[0] * own[1] > max_image_tokens else min_image_tokens
    scale = math.sqrt(bound / (rows * columns))
    grids = _grids_near(rows * scale, columns * scale, min_image_tokens, max_image_tokens)
    grids |= {(r, c) for c, r in _grids_near(columns * scale, rows * scale, min_image_tokens, max_image_tokens)}

    def distance(grid: tuple[int, int]) -> tuple:
        aspect, area = grid[0] / grid[1], grid[0] * grid[1]
        too_few = max(0, min_image_tokens - area)
        return too_few, abs(math.log(aspect * columns / rows)) + 0.5 * abs(math.log(area / bound)), grid

    return min(grids, key=distance)


def _grids_near(first: float, second: float, fewest: int, most: int) -> set[tuple[int, int]]:
    """Grids with about `first` tokens along one side, and along the other what aspect ratio and budget ask for."""
    near = range(max(1, min(most, math.floor(first) - 2)), min(most, math.ceil(first) + 2) + 1)
    return {
        (one, max(1, min(max(other, -(-fewest // one)), most // one)))
        for one in near
        for other in (math.floor(second), math.ceil(second), round(one * second / first))
    }


def is_video(image: Any) -> TypeGuard[Video]:
    return getattr(image, "is_video", False)


def are_several(images: Any) -> bool:
    """Whether it is a list of images, or an array [N, H, W, C] of them."""
    return isinstance(images, (list, tuple)) or getattr(images, "ndim", None) == 4


def flat_images(images: Any) -> Iterator[Any]:
    """The images of a nested list or of an array of several."""
    if are_several(images):
        for image in images:
            yield from flat_images(image)
    else:
        yield images


def _check_steps(kwargs: dict[str, Any]) -> None:
    """Raise ValueError for arguments of other image processors that would change nothing here."""
    ignored = {name: value for name, value in kwargs.items() if value is not None and not (name in ALWAYS and value)}
    if ignored:
        raise ValueError(
            f"{', '.join(f'{name}={value!r}' for name, value in ignored.items())}: not supported. Images are always "
            "resized, scaled to 0..1 (arrays may be so already) and normalised: set image_mean, image_std, resample "
            "or the budget of tokens on the image processor instead."
        )


class VoraImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """What one call may set otherwise than the image processor does."""

    min_image_tokens: int
    max_image_tokens: int


class VoraImageProcessor(BaseImageProcessor):
    """Resizes each image to whole patches at its own aspect ratio, normalises, and cuts it into patches.

    Args:
        patch_size: p, side of a patch in pixels.
        patch_merge: m; m x m patches become one image token.
        min_image_tokens, max_image_tokens: budget of image tokens per image; never cropped.
        pad_to_square: lay each image on a black square first. The paper's released weights expect that; otherwise bars
            are wasted tokens.
        image_mean, image_std: per channel, of values in 0..1; a teacher's own, if there is one.
        resample: PIL resampling filter.
    """

    allow_urls = False  # whether images at http(s) URLs are fetched; never saved
    _auto_class = "AutoImageProcessor"
    valid_kwargs = VoraImagesKwargs
    model_input_names = ["pixel_values", "image_grid_thw"]

    def __init__(
        self, patch_size: int = 14, patch_merge: int = 1, min_image_tokens: int = 4, max_image_tokens: int = 1024,
        pad_to_square: bool = False, image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5), resample: int = Image.Resampling.BICUBIC, **kwargs: Any,
    ):  # fmt: skip
        kwargs.pop("allow_urls", None)  # a configuration that came with a checkpoint does not decide that
        _check_steps({name: value for name, value in kwargs.items() if name.startswith("do_") or name in OTHERS})
        super().__init__(**kwargs)
        self.patch_size, self.patch_merge, self.pad_to_square = patch_size, patch_merge, pad_to_square
        self.min_image_tokens, self.max_image_tokens = self._budget(min_image_tokens, max_image_tokens)
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.resample = int(resample)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "allow_urls"}

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Paths, URLs, images and `Video`s, nested as they come, to RGB images."""
        if are_several(image_url_or_urls):
            return [self.fetch_images(source) for source in image_url_or_urls]
        if is_video(image_url_or_urls):
            return image_url_or_urls
        return fetch_image(image_url_or_urls, allow_urls=self.allow_urls)

    def preprocess(
        self, images: Any, min_image_tokens: int | None = None, max_image_tokens: int | None = None,
        return_tensors: str | None = None, **kwargs: Any,
    ) -> BatchFeature:  # fmt: skip
        """Patches of one image or `Video`, or of a (nested) list or an array [N, H, W, C] of them.

        The budget is of each image, of a video of each frame; see `set_budget`.

        Returns:
            pixel_values float[P, C*p*p]: patches of all images, raster order, each flattened (C, p, p).
            image_grid_thw int[N, 3]: frames (1 of an image), patch rows, patch columns of each image.

        Raises:
            ValueError: an image cannot be read, the budget is empty, or a step is to be left out or done otherwise.
        """
        _check_steps(kwargs)
        budget = self._budget(min_image_tokens, max_image_tokens)
        images = list(flat_images(self.fetch_images(images)))
        grids = [self.patch_grid(image.height, image.width, *budget) for image in images]
        frames = [image.frames if is_video(image) else [image] for image in images]
        patches = [self.patchify(frame, *grid) for one, grid in zip(frames, grids) for frame in one]
        data = {
            "pixel_values": np.concatenate(patches),
            "image_grid_thw": np.array([(len(one), *grid) for one, grid in zip(frames, grids)], dtype=np.int64),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def set_budget(self, min_image_tokens: int | None = None, max_image_tokens: int | None = None) -> None:
        """Change the budget of all images to come. What is None stays, but for a least above the new most."""
        self.min_image_tokens, self.max_image_tokens = self._budget(min_image_tokens, max_image_tokens)

    def _budget(self, min_image_tokens: int | None, max_image_tokens: int | None) -> tuple[int, int]:
        most = self.max_image_tokens if max_image_tokens is None else max_image_tokens
        least = min(self.min_image_tokens, most) if min_image_tokens is None else min_image_tokens
        if not 1 <= least <= most:
            raise ValueError(f"min_image_tokens {least} must be in 1..max_image_tokens {most}.")
        return least, most

    def patch_grid(self, height: int, width: int, min_image_tokens: int, max_image_tokens: int) -> tuple[int, int]:
        """(patch rows, patch columns) of an image of so many pixels, multiples of patch_merge."""
        token_size = self.patch_size * self.patch_merge
        if self.pad_to_square:
            height = width = max(height, width)
        rows, columns = fit_grid(height, width, token_size, min_image_tokens, max_image_tokens)
        return rows * self.patch_merge, columns * self.patch_merge

    def patchify(self, image: Image.Image, rows: int, columns: int) -> np.ndarray:
        """An RGB image to float[rows * columns, C*p*p], normalised."""
        size = (columns * self.patch_size, rows * self.patch_size)
        if self.pad_to_square:
            image = on_black_square(image)
        if image.size != size:
            image = image.resize(size, self.resample)
        mean, std = (np.array(one, np.float32) * 255 for one in (self.image_mean, self.image_std))
        if not (mean.shape == std.shape == (3,) and np.abs([mean, std]).max() < 1e6 and std.min() > 1e-3):
            raise ValueError(
                f"image_mean {self.image_mean} and image_std {self.image_std} of the image processor must be three "
                "numbers each, the latter above 0."
            )
        pixels = (np.asarray(image, dtype=np.float32) - mean) / std
        pixels = pixels.reshape(rows, self.patch_size, columns, self.patch_size, 3)
        return pixels.transpose(0, 2, 4, 1, 3).reshape(rows * columns, -1)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Patches of an image of this size in pixels; runtimes such as vLLM plan with it."""
        budget = self._budget(*((images_kwargs or {}).get(name) for name in ("min_image_tokens", "max_image_tokens")))
        return math.prod(self.patch_grid(height, width, *budget))
