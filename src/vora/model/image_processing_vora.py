"""PIL images to normalised patches and grids, each image at its own size."""

import base64
import io
import math
import os
import re
import warnings

import numpy as np
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from transformers import image_utils
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

SECONDS_TO_WAIT = 30  # for a server that has gone silent; a run would wait for it forever
BASE64 = re.compile(r"[A-Za-z0-9+/\s]+=*\s*")
LONGEST_PATH = 260
ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")  # a TIFF's pages and a camera's previews are no frames


def read_image(source):
    """An RGB image from whatever people have.

    EXIF rotation is applied, transparency laid on white, 16-bit grey scaled to 8 bits, CMYK converted, and of an
    animation the first frame taken.

    Args:
        source: PIL image, array, encoded bytes, path, URL or base64 string.

    Raises:
        ValueError: the file is missing, empty, truncated or no image; the message names it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks on palettes and EXIF are handled here
            return _to_rgb(_opened(source))
    except UnidentifiedImageError:
        cause = "it is not an image that PIL can read"
    except FileNotFoundError:
        cause = "there is no such file"
    except Exception as error:  # PIL's decoders and the network raise many kinds
        cause = " ".join(str(error).split())[:200] or type(error).__name__
    raise ValueError(f"Cannot read image {_name_of(source)}: {cause}. Give a readable image, or leave it out.")


def is_animated(source):
    """Whether a path is that of an animation; a URL, or what cannot be read, is none."""
    try:
        with Image.open(os.fspath(source).removeprefix("file://")) as image:
            return image.format in ANIMATED and getattr(image, "n_frames", 1) > 1
    except Exception:  # PIL's decoders raise many kinds
        return False


def is_base64(text):
    """Whether a text is base64 and no path: it is longer than paths are, or holds what PIL knows as an image."""
    if not BASE64.fullmatch(text) or os.path.isfile(text):
        return False
    if len(text) > LONGEST_PATH:
        return True
    try:
        Image.open(io.BytesIO(base64.b64decode(text))).close()
        return True
    except Exception:  # PIL's decoders raise many kinds
        return False


def _name_of(source):
    given = isinstance(source, (str, os.PathLike))
    return str(source if given else getattr(source, "filename", "") or type(source).__name__)[:200]


def _opened(source):
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, (str, os.PathLike, bytes)):
        return _from_array(np.asarray(source))
    with Image.open(_file_of(source)) as image:
        image.load()  # also tells whether it is whole
        return image


def _file_of(source):
    """What PIL can open: the path of a file, or a stream of the bytes that are given, in base64 or at a URL."""
    if not isinstance(source, bytes):
        name = os.fspath(source).removeprefix("file://")
        if name.startswith(("http://", "https://")):
            source = _fetched(name)
        elif name.startswith("data:") or is_base64(name):
            source = base64.b64decode(name.rpartition(",")[2])
        elif os.path.isfile(name) and os.path.getsize(name) == 0:
            raise ValueError("the file is empty (0 bytes)")
        else:
            return name
    if not source:
        raise ValueError("it has 0 bytes")
    return io.BytesIO(source)


def _fetched(url):
    """The bytes at a URL, by the client that transformers itself uses."""
    answer = image_utils.httpx.get(url, timeout=SECONDS_TO_WAIT, follow_redirects=True)
    if answer.is_error:
        raise ValueError(f"the server answers {answer.status_code} {answer.reason_phrase}")
    return answer.content


def _from_array(array):
    """uint8 or float (0..1 or 0..255) array [H, W], [H, W, C] or [C, H, W]."""
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.dtype.kind == "f":
        array = _to_8_bits(array, 1 if array.max(initial=0) <= 1 else 255)
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _to_rgb(image):
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16-bit, 32-bit and float grey: convert() would clip instead of scaling
        grey = np.asarray(image, dtype=np.float32)
        peaks = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535) if image.mode == "F" else (255, 65535)
        peak = next((peak for peak in peaks if grey.max(initial=0) <= peak), 65535)
        return Image.fromarray(_to_8_bits(grey, peak)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(array, peak):
    return (array.clip(0, peak) * (255 / peak)).round().astype(np.uint8)


class Video:
    """Frames that are one image of several times: `image_grid_thw` counts them, and each is a block of attention.

    Known by `is_video`, not by its class: remote code is loaded file by file, and each file has a class of its own.

    Args:
        source: list of frames (anything `read_image` takes), array [T, H, W, 3], or an animated image: PIL image,
            path, URL, base64 string or bytes.

    Raises:
        ValueError: there are no frames, or one cannot be read.
    """

    is_video = True

    def __init__(self, source):
        if isinstance(source, (str, os.PathLike, bytes, Image.Image)):
            name = f"of {len(source)} bytes" if isinstance(source, bytes) else _name_of(source)
            try:
                source = _frames_of(source)
            except Exception as error:  # PIL's decoders and the network raise many kinds
                raise ValueError(
                    f"Cannot read video {name}: {error}. Give its frames as a list of images, or an animated GIF, "
                    "WebP or PNG."
                ) from None
        self.frames = [read_image(frame) for frame in source]
        if not self.frames:
            raise ValueError("The video has 0 frames: give at least one.")

    @property
    def height(self):
        return self.frames[0].height

    @property
    def width(self):
        return self.frames[0].width


def _frames_of(animation):
    """The frames of an animated image, open or to be opened, in a list."""
    if isinstance(animation, Image.Image):
        return [frame.copy() for frame in ImageSequence.Iterator(animation)]
    with Image.open(_file_of(animation)) as opened:
        return _frames_of(opened)


def on_black_square(image):
    """An RGB image in the middle of the smallest black square that holds it."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def fit_grid(height, width, token_size, min_image_tokens, max_image_tokens):
    """The grid of whole image tokens near an image's size and aspect ratio within a budget.

    Args:
        height, width: pixels.
        token_size: side of an image token in pixels, patch_size * patch_merge.

    Returns:
        (rows, columns): the image's own size in tokens if that is within budget, else of the grids near the budget's
        bound the one nearest in aspect ratio and number of tokens. rows * columns <= max_image_tokens always, and
        >= min_image_tokens wherever a grid near is both (always where the budget spans a factor of two).
    """
    rows, columns = height / token_size, width / token_size
    own = max(1, round(rows)), max(1, round(columns))
    if min_image_tokens <= own[0] * own[1] <= max_image_tokens:
        return own
    bound = max_image_tokens if own[0] * own[1] > max_image_tokens else min_image_tokens
    scale = math.sqrt(bound / (rows * columns))
    grids = _grids_near(rows * scale, columns * scale, min_image_tokens, max_image_tokens)
    grids |= {(r, c) for c, r in _grids_near(columns * scale, rows * scale, min_image_tokens, max_image_tokens)}

    def distance(grid):
        aspect, area = grid[0] / grid[1], grid[0] * grid[1]
        too_few = max(0, min_image_tokens - area)
        return too_few, abs(math.log(aspect * columns / rows)) + 0.5 * abs(math.log(area / bound)), grid

    return min(grids, key=distance)


def _grids_near(first, second, fewest, most):
    """Grids with about `first` tokens along one side, and along the other what aspect ratio and budget ask for."""
    near = range(max(1, min(most, math.floor(first) - 2)), min(most, math.ceil(first) + 2) + 1)
    return {
        (one, max(1, min(max(other, -(-fewest // one)), most // one)))
        for one in near
        for other in (math.floor(second), math.ceil(second), round(one * second / first))
    }


def is_video(image):
    """Whether it is a `Video`."""
    return getattr(image, "is_video", False)


def are_several(images):
    """Whether it is a list of images, or an array [N, H, W, C] of them."""
    return isinstance(images, (list, tuple)) or getattr(images, "ndim", None) == 4


def flat_images(images):
    """The images of a nested list or of an array of several."""
    if are_several(images):
        for image in images:
            yield from flat_images(image)
    else:
        yield images


class VoraImagesKwargs(ImagesKwargs, total=False):
    """What one call may set otherwise than the image processor does."""

    min_image_tokens: int
    max_image_tokens: int


class VoraImageProcessor(BaseImageProcessor):
    """Resizes each image to whole patches at its own aspect ratio, normalises, and cuts it into patches.

    Args:
        patch_size: p, side of a patch in pixels.
        patch_merge: m; m x m patches become one image token.
        min_image_tokens, max_image_tokens: budget of image tokens per image; never cropped.
        pad_to_square: lay each image on a black square first, as the paper's released code does. Its weights expect
            that; otherwise bars are wasted tokens.
        image_mean, image_std: per channel, of values in 0..1; a teacher's own, if there is one.
        resample: PIL resampling filter.
    """

    _auto_class = "AutoImageProcessor"
    valid_kwargs = VoraImagesKwargs
    model_input_names = ["pixel_values", "image_grid_thw"]

    def __init__(
        self,
        patch_size=14,
        patch_merge=1,
        min_image_tokens=4,
        max_image_tokens=1024,
        pad_to_square=False,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        resample=Image.Resampling.BICUBIC,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not 1 <= min_image_tokens <= max_image_tokens:
            raise ValueError(f"min_image_tokens {min_image_tokens} must be in 1..max_image_tokens {max_image_tokens}.")
        self.patch_size = patch_size
        self.patch_merge = patch_merge
        self.min_image_tokens = min_image_tokens
        self.max_image_tokens = max_image_tokens
        self.pad_to_square = pad_to_square
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.resample = int(resample)

    def fetch_images(self, image_url_or_urls):
        """Paths, URLs, images and `Video`s, nested as they come, to RGB images."""
        if are_several(image_url_or_urls):
            return [self.fetch_images(source) for source in image_url_or_urls]
        return image_url_or_urls if is_video(image_url_or_urls) else read_image(image_url_or_urls)

    def preprocess(self, images, min_image_tokens=None, max_image_tokens=None, return_tensors=None, **kwargs):
        """Patches of one image or `Video`, or of a (nested) list or an array [N, H, W, C] of them.

        Args:
            min_image_tokens, max_image_tokens: budget of each image, of a video of each frame; where only the second
                is given and lies below the processor's own first, that one gives way.

        Returns:
            pixel_values float[P, C*p*p]: patches of all images, raster order, each flattened (C, p, p).
            image_grid_thw int[N, 3]: frames (1 of an image), patch rows, patch columns of each image.

        Raises:
            ValueError: an image cannot be read, or the budget is empty.
        """
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

    def set_budget(self, min_image_tokens=None, max_image_tokens=None):
        """Change the budget of all images to come; what is None stays, as far as it fits the other."""
        self.min_image_tokens, self.max_image_tokens = self._budget(min_image_tokens, max_image_tokens)

    def _budget(self, min_image_tokens, max_image_tokens):
        most = self.max_image_tokens if max_image_tokens is None else max_image_tokens
        least = min(self.min_image_tokens, most) if min_image_tokens is None else min_image_tokens
        if not 1 <= least <= most:
            raise ValueError(f"min_image_tokens {least} must be in 1..max_image_tokens {most}.")
        return least, most

    def patch_grid(self, height, width, min_image_tokens, max_image_tokens):
        """(patch rows, patch columns) of an image of so many pixels, multiples of patch_merge."""
        token_size = self.patch_size * self.patch_merge
        if self.pad_to_square:
            height = width = max(height, width)
        rows, columns = fit_grid(height, width, token_size, min_image_tokens, max_image_tokens)
        return rows * self.patch_merge, columns * self.patch_merge

    def patchify(self, image, rows, columns):
        """An RGB image to float[rows * columns, C*p*p], normalised."""
        size = (columns * self.patch_size, rows * self.patch_size)
        if self.pad_to_square:
            image = on_black_square(image)
        if image.size != size:
            image = image.resize(size, self.resample)
        mean, std = np.float32(self.image_mean) * 255, np.float32(self.image_std) * 255
        pixels = (np.asarray(image, dtype=np.float32) - mean) / std
        pixels = pixels.reshape(rows, self.patch_size, columns, self.patch_size, 3)
        return pixels.transpose(0, 2, 4, 1, 3).reshape(rows * columns, -1)

    def get_number_of_image_patches(self, height, width, images_kwargs=None):
        """Patches of an image of this size in pixels; runtimes such as vLLM plan with it."""
        given = [(images_kwargs or {}).get(name) for name in ("min_image_tokens", "max_image_tokens")]
        budget = self._budget(*given)
        return math.prod(self.patch_grid(height, width, *budget))
