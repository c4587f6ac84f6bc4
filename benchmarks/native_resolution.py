"""Accuracy against image budget and aspect ratio: pictures at their own aspect ratio, or padded to a square.

Both arms train on the same questions about the same pictures, with each image's budget drawn anew between 64 x 64 and
256 x 256 pixels: easy-VQA's figures on canvases of aspect ratio 1:1, 2:1 and 1:2, and, with --nlvr, NLVR's pictures
of 4:1. One arm sees them as they are, the other padded to squares. Both are asked at budgets and aspect ratios of
training and at such as they never saw. Each arm runs in a process of its own.

    python benchmarks/native_resolution.py --teacher WinKawaks/vit-tiny-patch16-224 --nlvr nlvr/dev.parquet
"""

import json
import random
import subprocess
import sys
import tempfile
from importlib.resources import files
from io import BytesIO
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rows import arguments, parser_of, report, row

from vora.data.sources import load_source
from vora.eval.answers import accuracy, exact_answers
from vora.train.pace import precision_overrides
from vora.train.recipe import load_recipe
from vora.train.run import train
from vora.train.trained import merge_run

SEEN = ((1, 1), (2, 1), (1, 2))  # width : height
UNSEEN = ((4, 1), (1, 4))
TOKEN = 32  # pixels: patches of 16, patch_merge 2
BUDGETS = (4, 16, 36, 64, 100, 144)  # image tokens; of the last two training saw none
ARMS = {"native": lambda image: image, "square": lambda image: square(image)}


def on_canvas(image, width, height, rng):
    """A picture on a canvas of so many times its sides, of its corner's colour, at a random place."""
    canvas = Image.new("RGB", (image.width * width, image.height * height), image.getpixel((0, 0)))
    canvas.paste(image, (rng.randint(0, canvas.width - image.width), rng.randint(0, canvas.height - image.height)))
    return canvas


def square(image):
    """Padded to a square of its corner's colour, centred."""
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), image.getpixel((0, 0)))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def write_rows(path, rows, form):
    """(image, questions, answers) to Parquet, the images as an arm sees them."""

    def encoded(image):
        buffer = BytesIO()
        form(image).save(buffer, "PNG")
        return buffer.getvalue()

    table = [{"image": encoded(image), "questions": q, "answers": a} for image, q, a in rows]
    pq.write_table(pa.Table.from_pylist(table), path, row_group_size=100)


def figures(split, aspects, count=None):
    """easy-VQA's pictures, each on a canvas of an aspect ratio drawn from some."""
    rng = random.Random(f"{split}/{aspects}")
    for record in load_source("easy-vqa", split, max_samples=count):
        asked, told = zip(*[(q["content"], a["content"]) for q, a in record.conversations])
        yield on_canvas(record.open_images()[0], *rng.choice(aspects), rng), list(asked), list(told)


def statements(path, test):
    """NLVR's pictures with their statements: every fifth scene is for testing, there without its other orderings."""
    for one in pq.read_table(path).to_pylist():
        scene, _, ordering = one["identifier"].rpartition("-")
        if (int(scene.split("-")[0]) % 5 == 0) == test and (not test or ordering == "0"):
            yield Image.open(BytesIO(one["image"]["bytes"])).convert("RGB"), [one["sentence"]], [str(one["label"])]


def run_arm(arm, args):
    """Train and ask; prints {set: {budget: accuracy}} as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_rows(folder / "figures.parquet", figures("train", SEEN), ARMS[arm])
        sources = [{"path": str(folder / "figures.parquet"), "weight": 3}]
        tests = {f"{w}:{h}": figures("test", ((w, h),), args.test_pictures) for w, h in (*SEEN, *UNSEEN)}
        if args.nlvr:
            write_rows(folder / "statements.parquet", statements(args.nlvr, test=False), ARMS[arm])
            sources.append({"path": str(folder / "statements.parquet"), "weight": 1})
            tests["NLVR 4:1"] = islice(statements(args.nlvr, test=True), 2 * args.test_pictures)
        overrides = {
            "model.llm": args.llm, "model.patch_merge": 2, "model.image_size": 256, "teacher.name": args.teacher,
            "teacher.image_only_steps": args.image_only_steps, "teacher.eyes_scale": 0.2,
            "lora.num_blocks": 12, "max_minutes": "null",
            "data.sources": sources, "data.row_tokens": 256, "data.image_tokens": [4, 64],
            "training.seed": args.seed, "training.max_steps": args.image_only_steps + args.lm_steps,
        } | precision_overrides()  # fmt: skip
        values = [
            f"{key}={json.dumps(value) if isinstance(value, list) else value}" for key, value in overrides.items()
        ]
        recipe = load_recipe(Path(str(files("vora.quickstart"))) / "recipe.yaml", values)
        train(recipe, folder / "run", console=Console(stderr=True))
        model, processor = merge_run(folder / "run")
        found = {}
        for name, rows in tests.items():
            write_rows(folder / "test.parquet", rows, ARMS[arm])
            records = load_source(str(folder / "test.parquet"))
            found[name] = {
                n: accuracy(exact_answers(model, processor, records, min_image_tokens=n // 2, max_image_tokens=n))
                for n in BUDGETS
            }
            print(name, found[name], file=sys.stderr, flush=True)
    print(json.dumps(found))


def rows_of(found):
    """Native beside padded, for each set of pictures and each budget.

    Args:
        found: {arm: {set: {budget: accuracy}}}, budgets in image tokens.
    """
    for name, native in found["native"].items():
        for budget, share in native.items():
            what = f"{name}, native against square, {int(budget) * TOKEN**2:,} pixels"
            yield row(what, share, found["square"][name][budget], "accuracy", image_tokens=int(budget))


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--teacher", default="WinKawaks/vit-tiny-patch16-224", help="a ViT with patches of 16 pixels")
    parser.add_argument("--nlvr", help="Parquet of NLVR with image, sentence, label, identifier")
    parser.add_argument("--llm", default="smollm2-135m")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-only-steps", type=int, default=320)
    parser.add_argument("--lm-steps", type=int, default=400)
    parser.add_argument("--test-pictures", type=int, default=70)
    parser.add_argument("--arm", choices=ARMS, help="one arm, in this process")
    args = arguments(parser)
    if args.arm:
        run_arm(args.arm, args)
        return
    found = {}
    for arm in ARMS:
        done = subprocess.run([sys.executable, *sys.argv, "--arm", arm], check=True, stdout=subprocess.PIPE)
        found[arm] = json.loads(done.stdout.splitlines()[-1])
    report(rows_of(found), args.json)


if __name__ == "__main__":
    main()
