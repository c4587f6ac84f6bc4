"""The prompts on which engines are compared: an image of whole tokens, as it is or with far patches swapped."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

from vora.model.fetch_image import fetch_image
from vora.model.image_processing_vora import on_black_square
from vora.model.processing_vora import VoraProcessor

CLOUDS = ((256, 256), (320, 160), (160, 320))  # sizes of drawn images
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


@dataclass
class Prompt:
    """An image of whole tokens, a question, and the model inputs that both make."""

    image: Image.Image
    question: str
    inputs: BatchFeature
    first_image_token: int  # its place in `input_ids`

    @property
    def length(self) -> int:
        return self.inputs["input_ids"].shape[1]


def make_prompt(processor: VoraProcessor, image: Image.Image, question: str) -> Prompt:
    """The inputs of a question about an image."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor.image_processor(image, return_tensors="pt")
    num_tokens = int(inputs["image_grid_thw"].prod()) // processor.image_processor.patch_merge**2
    first, rest = (processor.ids_of(part) for part in str(text).split(processor.image_token))
    inputs["input_ids"] = torch.tensor([[*first, *[processor.image_token_id] * num_tokens, *rest]])
    return Prompt(image, question, inputs, len(first))


def with_image_markers(processor: VoraProcessor, image_markers: Sequence[str]) -> VoraProcessor:
    """A processor that puts these texts before and after each image."""
    template = processor.text_tokenizer().chat_template
    processor = copy.copy(processor)
    processor.image_markers = list(image_markers)
    return processor.set_template(template)


def in_whole_tokens(processor: VoraProcessor, image: Image.Image) -> Image.Image:
    """An image at the size to which the model's own image processor brings it."""
    images = processor.image_processor
    image = on_black_square(image) if images.pad_to_square else image
    rows, columns = images.patch_grid(image.height, image.width, images.min_image_tokens, images.max_image_tokens)
    return image.resize((columns * images.patch_size, rows * images.patch_size), images.resample)


def squared(processor: VoraProcessor, image: Image.Image, size: int) -> Image.Image:
    """An image brought to a square, as the model's own image processor resizes."""
    images = processor.image_processor
    image = on_black_square(image) if images.pad_to_square else image
    return image.resize((size, size), images.resample)


def swap_far_patches(image: Image.Image, token_size: int) -> Image.Image | None:
    """An image of whole tokens with those of its later half in reverse order; None where it has fewer than three."""
    rows, columns = image.height // token_size, image.width // token_size
    pixels = np.asarray(image).reshape(rows, token_size, columns, token_size, 3).swapaxes(1, 2)
    tokens = pixels.reshape(rows * columns, token_size, token_size, 3)
    half = max(1, len(tokens) // 2)
    if len(tokens) < 3:
        return None
    tokens = np.concatenate([tokens[:half], tokens[half:][::-1]])
    pixels = tokens.reshape(rows, columns, token_size, token_size, 3).swapaxes(1, 2)
    return Image.fromarray(np.ascontiguousarray(pixels).reshape(np.asarray(image).shape))


def images_to_compare(paths: Sequence[str], most: int | None = None) -> list[Image.Image]:
    """The images of files and folders, of more than `most` so many, evenly spread; without any, three of coloured
    clouds at three aspect ratios. ValueError where a folder has none."""
    found: list[str] = []
    for path in paths:
        folder = Path(path)
        inside = sorted(str(one) for one in folder.glob("*") if one.suffix.lower() in SUFFIXES)
        if folder.is_dir() and not inside:
            raise ValueError(f"{path} holds no image ({', '.join(sorted(SUFFIXES))}): name another folder, or files.")
        found += inside if folder.is_dir() else [path]
    count = min(len(found), most or len(found))
    found = [found[number * len(found) // count] for number in range(count)]
    return [fetch_image(one) for one in found] or [_clouds(seed, size) for seed, size in enumerate(CLOUDS)]


def _clouds(seed: int, size: tuple[int, int]) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)
