"""What PIL or NumPy holds, in whatever mode, as the RGB image that people see.

Dims: H rows and W columns of pixels, C channels.
"""

import numpy as np
from PIL import Image

ORIENTATION = 0x0112  # the tag in EXIF
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # from its values to those of PIL's Transpose


def from_array(array: np.ndarray) -> Image.Image:
    """uint8, int or float (0..1 or 0..255) array [H, W], [H, W, C] or [C, H, W]."""
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim not in (2, 3) or not array.size or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(f"its shape {array.shape} is none of [H, W], [H, W, C] and [C, H, W] with 1, 3 or 4 channels")
    if array.dtype.kind in "fi":
        least, most = (1, 255) if array.dtype.kind == "f" else (255, 65535)
        array = _to_8_bits(array, least if array.max() <= least else most)
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def to_rgb(image: Image.Image) -> Image.Image:
    image.load()  # also tells whether it is whole
    image = _upright(image)
    if image.mode.startswith(("I", "F")):  # 16-bit, 32-bit and float grey: convert() would clip instead of scaling
        grey = np.asarray(image, dtype=np.float32)
        peaks = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535) if image.mode == "F" else (255, 65535)
        peak = next((peak for peak in peaks if grey.max() <= peak), 65535)
        return Image.fromarray(_to_8_bits(grey, peak)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image, white = image.convert("RGBA"), Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return image.transpose(Image.Transpose(TURNS[image.getexif()[ORIENTATION]]))
    except Exception:  # of many kinds: no EXIF, or a damaged one, does not say how the image was held
        return image


def _to_8_bits(array: np.ndarray, peak: int) -> np.ndarray:
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= peak):  # NaN is neither
        cause = "NaN" if np.isnan(array).any() else f"values from {low:g} to {high:g}"
        raise ValueError(f"it has {cause}: give values in 0..255, or 0..1")
    scaled = np.multiply(array, 255 / peak)
    return np.rint(scaled, out=scaled).astype(np.uint8)
