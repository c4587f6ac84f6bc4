"""Asks an export of `vora export --to onnx` about an image, without torch: numpy, pillow, tokenizers, onnxruntime.

vora export -m MODEL --to onnx -o my-onnx
python examples/onnx_chat.py my-onnx photo.png "What is in the image?"
"""

import json
import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image
from tokenizers import Tokenizer

MOST_TOKENS = 64


def normalised(image, size, values):
    """float[1, 3, S, S]"""
    resized = image.convert("RGB").resize((size, size), Image.Resampling(values["resample"]))
    pixels = np.asarray(resized, np.float32) / 255
    return ((pixels - values["image_mean"]) / values["image_std"]).transpose(2, 0, 1)[None].astype(np.float32)


def main(folder, image, question):
    folder = Path(folder)
    export = json.loads((folder / "export.json").read_text())
    processor = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    embed, vision, decoder = (
        InferenceSession(str(folder / f"{name}.onnx"))
        for name in ("embed_tokens", "vision_encoder", "decoder_model_merged")
    )
    text = export["prompt"].replace("QUESTION", question)
    before, after = (
        tokenizer.encode(part, add_special_tokens=False).ids for part in text.split(export["image_token"])
    )
    ids = np.array([[*before, *[export["image_token_id"]] * export["num_image_tokens"], *after]])
    is_image = ids == export["image_token_id"]
    embeds = embed.run(None, {"input_ids": ids})[0]
    pixels = normalised(Image.open(image), export["image_size"], processor)
    embeds[is_image] = vision.run(None, {"pixel_values": pixels})[0][0]
    names = [one.name for one in decoder.get_inputs()]
    cache = [
        np.zeros((1, heads, 0, width), np.float32)
        for _, heads, _, width in (i.shape for i in decoder.get_inputs()[2:])
    ]
    image_numbers, answer = is_image.astype(np.int64) - 1, []
    while len(answer) < MOST_TOKENS:
        logits, *cache = decoder.run(None, dict(zip(names, [embeds, image_numbers, *cache])))
        token = int(logits[0, -1].argmax())
        if token in export["end_ids"]:
            break
        answer.append(token)
        embeds, image_numbers = embed.run(None, {"input_ids": np.array([[token]])})[0], np.array([[-1]])
    print(tokenizer.decode(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
