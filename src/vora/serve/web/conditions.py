"""What a model is shown for one question: the image as it reads it, and two that only look alike in some way."""

import copy
from collections.abc import Sequence

from PIL import Image

from vora.model.image_processing_vora import VoraImageProcessor
from vora.report.images import blank, image_of_patches, shuffled

RIGHT, BLANK, SHUFFLED = CONDITIONS = ("right image", "blank image", "shuffled patches")


def with_budget(image_processor: VoraImageProcessor, max_image_tokens: int) -> VoraImageProcessor:
    """A copy of an image processor that makes at most so many tokens of an image, and of a small one fewer than
    before if its least was more."""
    image_processor = copy.deepcopy(image_processor)
    image_processor.set_budget(max_image_tokens=max_image_tokens)
    return image_processor


def token_grid(image: Image.Image, image_processor: VoraImageProcessor) -> tuple[int, int]:
    """(rows, columns) of the tokens of an image `as_read`."""
    side = image_processor.patch_size * image_processor.patch_merge
    return image.height // side, image.width // side


def as_read(image: Image.Image, image_processor: VoraImageProcessor) -> Image.Image:
    """An RGB image at the size to which a model's image processor brings it: whole tokens within the budget, which any
    engine that reads images at their own size leaves as it is."""
    inputs = image_processor.preprocess(image, return_tensors="np")
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    return image_of_patches(inputs["pixel_values"], rows, columns, image_processor)


def images_to_show(
    image: Image.Image, image_processor: VoraImageProcessor, conditions: Sequence[str]
) -> dict[str, Image.Image]:
    """For each of some CONDITIONS, in their order, what the model is shown, at one size in pixels."""
    read = as_read(image, image_processor)
    make = {RIGHT: lambda: read, BLANK: lambda: blank(read), SHUFFLED: lambda: shuffled(read, image_processor, seed=0)}
    return {condition: make[condition]() for condition in CONDITIONS if condition in conditions}
