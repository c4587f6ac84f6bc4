"""Images on their way into the model: how many a second, and does the trainer ever wait for them?

JPEGs of 500 x 375 pixels, decoded, resized and cut into patches of 14 pixels by one thread: ours against the PIL
processor of Qwen2-VL, which keeps aspect ratios too, and against the black square of the original. Then the whole
loader (Parquet to packed batches, in this one process) against training steps on its batches, which is what it must
feed. Nothing is fetched: the JPEGs are of smooth noise, and the tokenizer knows bytes alone.

    python benchmarks/data.py --json data.json
"""

import tempfile
from io import BytesIO
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from contestants import PATCH, SIZES, Contestant, default_attention, default_dtype, image_token_id, on_device
from original import square_frame
from PIL import Image
from rows import alternate, arguments, compared, parser_of, report, row, spread
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vora import VoraImageProcessor, VoraProcessor
from vora.data.readers import load_source
from vora.data.stream import PackedBatches, PackedSequences

IMAGE_SIZE = (500, 375)
LARGEST = 448  # side of the original's square; ours may make as many tokens of an image


def jpegs(count):
    """list of encoded images of 500 x 375 pixels: smooth noise."""
    rng, buffers = np.random.default_rng(0), [BytesIO() for _ in range(count)]
    for buffer in buffers:
        image = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8))
        image.resize(IMAGE_SIZE, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    return [buffer.getvalue() for buffer in buffers]


def compare_processors(images, rounds):
    """Rows of images a second on one thread."""
    ours = VoraImageProcessor(patch_size=PATCH, max_image_tokens=(LARGEST // PATCH) ** 2)
    qwen = Qwen2VLImageProcessorPil()
    processes = {
        "ours": lambda image: ours(image, return_tensors="np")["pixel_values"],
        "Qwen2-VL's PIL processor": lambda image: qwen(image.convert("RGB"), return_tensors="np")["pixel_values"],
        "the original's black square": lambda image: square_frame(image.convert("RGB"), LARGEST),
    }
    first = Image.open(BytesIO(images[0]))
    patches = {name: int(np.prod(process(first).shape)) // (3 * PATCH**2) for name, process in processes.items()}
    patches["Qwen2-VL's PIL processor"] //= 2  # each patch is there twice: it thinks in pairs of frames

    def of_all(process):
        return lambda: [process(Image.open(BytesIO(data))) for data in images]

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = alternate({name: of_all(process) for name, process in processes.items()}, rounds)
    torch.set_num_threads(num_threads)
    for name in list(processes)[1:]:
        what = f"JPEGs to patches, one thread, against {name} ({patches['ours']} and {patches[name]} patches)"
        yield compared(what, times, "images/s", lambda seconds: len(images) / seconds, baseline=name)


def batches_of(images, folder, size, args):
    """An endless stream of packed batches, from a Parquet file."""
    rows = [{"image": data, "question": "What is this?", "answer": "an image of something"} for data in images]
    pq.write_table(pa.Table.from_pylist(rows), f"{folder}/train.parquet", row_group_size=100)
    processor = VoraProcessor.from_llm(byte_tokenizer(size), patch_size=PATCH, image_size=size.image_size)
    packed = PackedSequences([load_source(f"{folder}/train.parquet")], processor, args.sequence_length)
    return iter(PackedBatches(packed, args.sequences_per_batch))


def byte_tokenizer(size):
    """A token for each byte, and the image token of a size's models."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"<image>": image_token_id(size)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!")


def compare_with_trainer(folder, images, size, args):
    """The row of samples a second that are loaded and trained on."""
    batches, counts = batches_of(images, folder, size, args), []

    def load():
        counts.append(sum(int(batch["num_samples"]) for batch in islice(batches, args.batches)))

    batch = next(batches)
    trainer = Contestant("ours", size, [on_device(batch)], getattr(torch, args.dtype), default_attention())
    times = alternate({"loader": load, "trainer": trainer}, args.rounds)
    loaded = float(np.median([count / seconds for count, seconds in zip(counts[1:], times["loader"])]))
    num_samples = int(batch["num_samples"])
    trained = num_samples / float(np.median(times["trainer"]))
    num_tokens = int((batch["seen_until"] > torch.arange(args.sequence_length)).sum())
    what = f"Parquet to packed batches in one process, against train step, {args.size}, {args.dtype}"
    noise = {name: spread(values) for name, values in times.items()}
    return row(what, loaded, trained, "samples/s", noise=noise, tokens_per_sample=num_tokens / num_samples)


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--size", choices=SIZES, default="smollm2-135m")
    parser.add_argument("--count", type=int, default=100, help="images")
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--sequences-per-batch", type=int, default=1)
    parser.add_argument("--batches", type=int, default=40, help="that the loader makes in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=default_dtype())
    args = arguments(parser)
    images = jpegs(args.count)

    def rows():
        yield from compare_processors(images, args.rounds)
        with tempfile.TemporaryDirectory() as folder:
            yield compare_with_trainer(folder, images, SIZES[args.size], args)

    report(rows(), args.json)


if __name__ == "__main__":
    main()
