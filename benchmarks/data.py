"""Images on their way into the model: how many a second?

JPEGs of 500 x 375 pixels, decoded, resized and cut into patches of 14 pixels by one thread: ours against the PIL
processor of Qwen2-VL, which keeps aspect ratios too, and against the black square of the original. Nothing is fetched:
without --images the JPEGs are of smooth noise. Whether training waits for data, `vora train` prints itself.

    python benchmarks/data.py --json data.json
"""

from io import BytesIO

import numpy as np
import pyarrow.parquet as pq
import torch
from contestants import PATCH
from original import square_frame
from PIL import Image
from rows import alternate, arguments, compared, parser_of, report
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vora import VoraImageProcessor

IMAGE_SIZE = (500, 375)
LARGEST = 448  # side of the original's square; ours may make as many tokens of an image


def jpegs(path, count):
    """list of encoded images of 500 x 375 pixels: a Parquet file's, or smooth noise."""
    if path:
        column = pq.read_table(path, columns=["image"]).column("image").slice(0, count).to_pylist()
        images = [Image.open(BytesIO(one["bytes"])).convert("RGB") for one in column]
    else:
        rng = np.random.default_rng(0)
        images = [Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)) for _ in range(count)]
    return [encoded(image.resize(IMAGE_SIZE, Image.Resampling.BICUBIC)) for image in images]


def encoded(image):
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


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


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--images", help="Parquet with encoded images in `image`; smooth noise without it")
    parser.add_argument("--count", type=int, default=100, help="images")
    parser.add_argument("--rounds", type=int, default=3)
    args = arguments(parser)
    report(compare_processors(jpegs(args.images, args.count), args.rounds), args.json)


if __name__ == "__main__":
    main()
