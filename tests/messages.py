"""Messages with small images, as people write them, and what a processor makes of them."""

import json
from itertools import groupby

import numpy as np
from PIL import Image

SIZES = {"patch_size": 4, "image_size": 12}  # of the processors and models that these are for


def coloured(colour, size=(12, 12), mode="RGB"):
    return Image.new(mode, size, colour)


def noise(size, seed=0):
    """An RGB image, each pixel of which is its own."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def write_questions(file):
    """A file of two rows with image, question and answer, and the images beside it; returns the file."""
    rows = [{"image": f"{name}.png", "question": "what?", "answer": name} for name in ("red", "blue")]
    for row in rows:
        coloured(row["answer"], (16, 16)).save(file.parent / row["image"])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def user(*parts):
    """A user's message of texts (str), videos (lists) and images (anything else, or a path ending in .png)."""
    kinds = {str: "text", list: "video"}
    content = []
    for part in parts:
        kind = "image" if str(part).endswith(".png") else kinds.get(type(part), "image")
        content.append({"type": kind, kind: part})
    return {"role": "user", "content": content}


def assistant(text):
    return {"role": "assistant", "content": text}


def encode(processor, messages, **kwargs):
    kwargs = {"add_generation_prompt": True, "return_tensors": "pt", **kwargs}
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)


def spoken(processor, sample):
    """The text of each run of labels."""
    runs = groupby(sample["labels"], lambda label: label != -100)
    return [processor.tokenizer.decode(list(run)) for has_label, run in runs if has_label]
