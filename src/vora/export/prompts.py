"""The prompts on which engines are compared: an image of whole tokens, as it is or with far patches swapped."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

from vora.export.carrier import BEGIN, END
from vora.model.fetch_image import fetch_image
from vora.model.image_processing_vora import on_black_square
from vora.model.processing_vora import VoraProcessor

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


def make_prompt(processor: VoraProcessor, image: Image.Image, question: str, with_markers: bool) -> Prompt:
    """The inputs of a question about an image, where wanted with the texts that llama.cpp puts around images."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor.image_processor(image, return_tensors="pt")
    num_tokens = int(inputs["image_grid_thw"].prod()) // processor.image_processor.patch_merge**2
    before, after = str(text).split(processor.image_token)
    parts = [before, BEGIN, END, after] if with_markers else [before, after]
    ids = [processor.ids_of(part) for part in parts]
    first = [id for part in ids[: len(ids) // 2] for id in part]
    rest = [id for part in ids[len(ids) // 2 :] for id in part]
    inputs["input_ids"] = torch.tensor([[*first, *[processor.image_token_id] * num_tokens, *rest]])
    return Prompt(image, question, inputs, len(first))


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


def images_to_compare(paths: Sequence[str]) -> list[Image.Image]:
    """The images of files and folders; without any, three of coloured clouds. ValueError where a folder has none."""
    found: list[str] = []
    for path in paths:
        folder = Path(path)
        inside = sorted(str(one) for one in folder.glob("*") if one.suffix.lower() in SUFFIXES)
        if folder.is_dir() and not inside:
            raise ValueError(f"{path} holds no image ({', '.join(sorted(SUFFIXES))}): name another folder, or files.")
        found += inside if folder.is_dir() else [path]
    return [fetch_image(one) for one in found] or [_clouds(seed) for seed in range(3)]


def _clouds(seed: int) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((256, 256), Image.Resampling.BICUBIC)
