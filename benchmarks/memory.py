"""Peak memory and time of a training step, ours against the original, and how both grow.

Each contestant runs in a process of its own, so that peaks are its own: resident memory on a CPU, allocated memory on
a GPU. First a batch of pictures in the usual sizes. Then square pictures of a growing number of tokens, and growing
batches, with the exponents of power laws fitted to what a step takes above the model at rest.

    python benchmarks/memory.py --json memory.json
"""

import argparse
import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from contestants import (
    PATCH,
    SIZES,
    batches_of_rows,
    build_original,
    build_ours,
    default_attention,
    default_dtype,
    full_rows,
    make_samples,
    optimizer_of,
    original_batches,
    our_sample,
    squared,
    train_step,
)
from rows import arguments, parser_of, peak_bytes, report, restart_peak, row, seconds

ARMS = ("ours", "original")
WORDS = (24, 25)  # of each answer where tokens of images are counted


def usual_batches(size, args):
    """Batches of both for the pictures that fill some rows."""
    samples, rows = full_rows(size, args.row_tokens, args.rows)
    return batches_of_rows(rows, size, args.row_tokens, args.rows), original_batches(samples, size, len(samples))


def square_batches(size, args):
    """Batches of both with `batch` square pictures of `image_tokens` tokens, one a row."""
    samples = squared(make_samples(args.batch, size, WORDS), size.image_size)
    rows = [[our_sample(sample, size)] for sample in samples]
    longest = max(len(sample["input_ids"]) for (sample,) in rows)
    return batches_of_rows(rows, size, longest, len(rows)), original_batches(samples, size, args.batch)


def run_arm(args):
    """Two steps of one contestant; prints its figures as JSON. The first warms up."""
    size = SIZES[args.size]
    if args.image_tokens:
        size = replace(size, image_size=PATCH * math.isqrt(args.image_tokens))
    ours, theirs = square_batches(size, args) if args.image_tokens else usual_batches(size, args)
    dtype = getattr(torch, args.our_dtype if args.arm == "ours" else args.baseline_dtype)
    if args.arm == "ours":
        model, batch = build_ours(size, dtype, args.attn), ours[0]
    else:
        model, batch = build_original(size, dtype), theirs[0]
    optimizer = optimizer_of(model, fused=args.arm == "ours")
    resting = restart_peak()
    times = [seconds(lambda: train_step(model, batch, optimizer, dtype)) for _ in range(args.steps)]
    print(json.dumps({"resting": resting, "peak": peak_bytes(), "seconds": min(times[1:] or times)}))


def measure(args, arm, *words):
    """What `run_arm` prints, from a process of its own."""
    options = ("size", "row_tokens", "rows", "steps", "our_dtype", "baseline_dtype", "attn")
    given = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in options]
    given += [f"--clock={args.clock}", *([f"--threads={args.threads}"] if args.threads else [])]
    command = [sys.executable, __file__, *given, "--arm", arm, *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def exponent(sizes, values):
    """Slope of log value against log size; None where values did not grow above zero."""
    if len(sizes) < 2 or min(values) <= 0:
        return None
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def growth(args, name, points, of_point):
    """Rows for each point, then rows of exponents, of time and of memory above rest.

    Args:
        points: the growing quantity.
        of_point: point to the options of `run_arm`.
    """
    found = {arm: [measure(args, arm, *of_point(point)) for point in points] for arm in ARMS}
    rows = []
    for point, ours, original in zip(points, *found.values()):
        above = [one["peak"] - one["resting"] for one in (ours, original)]
        rows.append(row(f"step with {point} {name}", ours["seconds"], original["seconds"], "s"))
        rows.append(row(f"step with {point} {name}, memory above rest", *above, "bytes"))
    for what, value in {
        "time": lambda one: one["seconds"],
        "memory": lambda one: one["peak"] - one["resting"],
    }.items():
        fitted = [exponent(points, [value(one) for one in found[arm]]) for arm in ARMS]
        steps = {
            arm: [
                exponent(pair, [value(one) for one in ends])
                for pair, ends in zip(pairwise(points), pairwise(found[arm]))
            ]
            for arm in ARMS
        }
        rows.append(row(f"exponent of {what} in {name}", *fitted, "exponent", between_points=steps))
    return rows


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--size", choices=SIZES, default="smollm2-135m")
    parser.add_argument("--row-tokens", type=int, default=512, help="of the batch of usual pictures")
    parser.add_argument("--rows", type=int, default=2, help="of that batch")
    parser.add_argument("--grow-tokens", type=int, nargs="*", default=[64, 256, 1024], help="image tokens; squares")
    parser.add_argument("--grow-batch", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--grow-batch-tokens", type=int, default=64, help="image tokens while the batch grows")
    parser.add_argument("--steps", type=int, default=2, help="of which the first is not timed")
    parser.add_argument("--our-dtype", choices=("float32", "bfloat16"), default=default_dtype())
    plain = "bfloat16" if torch.cuda.is_available() else "float32"
    parser.add_argument("--baseline-dtype", choices=("float32", "bfloat16"), default=plain)
    parser.add_argument("--attn", default=default_attention())
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--image-tokens", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=1, help=argparse.SUPPRESS)
    args = arguments(parser)
    if args.arm:
        run_arm(args)
        return
    usual = [measure(args, arm) for arm in ARMS]
    peaks, above = [one["peak"] for one in usual], [one["peak"] - one["resting"] for one in usual]
    what = f"train step, {args.size}, {args.rows} rows of {args.row_tokens} tokens"
    rows = [row(f"peak of a {what}", *peaks, "bytes"), row(f"memory above rest of a {what}", *above, "bytes")]
    if args.grow_tokens:
        rows += growth(args, "image tokens", args.grow_tokens, lambda count: ("--image-tokens", count))
    if args.grow_batch:
        tokens = args.grow_batch_tokens
        name = f"pictures of {tokens} tokens"
        rows += growth(args, name, args.grow_batch, lambda count: ("--image-tokens", tokens, "--batch", count))
    report(rows, args.json)


if __name__ == "__main__":
    main()
