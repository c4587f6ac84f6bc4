"""How fast pictures become model inputs, against the PIL processor of Qwen2-VL and against what a trainer consumes.

First, JPEGs of 500 x 375 pixels in one process: decoded, resized and cut into patches of 14 pixels, by both. Then the
whole loader (Parquet to packed batches, in this one process) against training steps of a recipe on the same batches.

    python benchmarks/data_loading.py --pictures imagenet/train.parquet --json data_loading.json
"""

import argparse
import json
import os
import tempfile
import time
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vora import VoraImageProcessor
from vora.data.sources import load_source
from vora.data.stream import PackedBatches, PackedRows
from vora.train.pace import precision_overrides, seconds_per_step
from vora.train.recipe import load_recipe
from vora.train.run import training_arguments
from vora.train.stages import build_learner

SIZE = (500, 375)


def jpegs(path, count):
    """Encoded pictures of 500 x 375 pixels: a Parquet file's, or smooth noise."""
    if path:
        column = pq.read_table(path, columns=["image"]).column("image").slice(0, count).to_pylist()
        pictures = [Image.open(BytesIO(one["bytes"])).convert("RGB") for one in column]
    else:
        rng = np.random.default_rng(0)
        pictures = [Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)) for _ in range(count)]
    for picture in pictures:
        buffer = BytesIO()
        picture.resize(SIZE, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
        yield buffer.getvalue()


def pictures_per_second(process, encoded, rounds):
    """Median over rounds."""
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        for data in encoded:
            process(Image.open(BytesIO(data)))
        rates.append(len(encoded) / (time.perf_counter() - start))
    return median(rates)


def loader_and_trainer(encoded, args):
    """(samples per second of the loader, of the trainer, tokens per sample) on the same batches."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"image": data, "question": "What is this?", "answer": "a picture of something"} for data in encoded]
        pq.write_table(pa.Table.from_pylist(rows), f"{folder}/train.parquet", row_group_size=100)
        overrides = {"model.llm": args.llm, "data.sources.0.path": f"{folder}/train.parquet", "data.row_tokens": 1024}
        overrides |= {"max_minutes": "null", "training.per_device_train_batch_size": 1} | precision_overrides()
        values = [f"{key}={value}" for key, value in overrides.items()]
        recipe = load_recipe(Path(str(files("vora.quickstart"))) / "recipe.yaml", values)
        learner, processor = build_learner(recipe)
        processor.image_processor.set_budget(max_image_tokens=900)  # their own size: 23 x 31 patches of 16 pixels
        packed = PackedRows([load_source(f"{folder}/train.parquet")], processor, recipe.data.row_tokens)
        batches, num_samples, num_tokens = iter(PackedBatches(packed, 1)), 0, 0
        next(batches)
        start = time.perf_counter()
        for _ in range(args.batches):
            batch = next(batches)
            num_samples += int(batch["num_samples"])
            num_tokens += int((batch["seen_until"] > torch.arange(recipe.data.row_tokens)).sum())
        loaded = num_samples / (time.perf_counter() - start)
        step = seconds_per_step(learner, packed, packed.sample_rows(), training_arguments(recipe, Path(folder)))
        return loaded, num_samples / args.batches / step, num_tokens / num_samples


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", help="Parquet with encoded pictures in `image`; smooth noise without it")
    parser.add_argument("--llm", default="smollm2-135m")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    encoded = list(jpegs(args.pictures, args.count))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours = VoraImageProcessor(patch_size=14, max_image_tokens=1024)
    theirs = Qwen2VLImageProcessorPil()
    patches = [
        len(one(Image.open(BytesIO(encoded[0])), return_tensors="np")["pixel_values"]) for one in (ours, theirs)
    ]
    found = {
        "patches_per_picture": patches,
        "vora_pictures_per_second": pictures_per_second(lambda i: ours(i, return_tensors="np"), encoded, args.rounds),
        "qwen2_vl_pictures_per_second": pictures_per_second(
            lambda i: theirs(i.convert("RGB"), return_tensors="np"), encoded, args.rounds
        ),
    }
    found["ratio_to_qwen2_vl"] = found["vora_pictures_per_second"] / found["qwen2_vl_pictures_per_second"]
    torch.set_num_threads(threads)
    loaded, trained, tokens = loader_and_trainer(encoded, args)
    found |= {"loader_samples_per_second": loaded, "trainer_samples_per_second": trained, "tokens_per_sample": tokens}
    found |= {"ratio_of_loader_to_trainer": loaded / trained, "num_cpus": os.cpu_count()}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    for name, value in found.items():
        print(f"{name:32s} {value if isinstance(value, list) else f'{value:10.4g}'}")


if __name__ == "__main__":
    main()
