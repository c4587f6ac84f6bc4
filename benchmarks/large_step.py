"""A training step at the size of the released model: FLOP/s against a measured ceiling, memory, where time goes.

Qwen2.5-7B's shape with rank 1024 on 24 of 28 blocks, AIMv2-Huge's as the teacher, images of some 1,000 tokens (448
pixels): random weights. The ceiling is what matrix products in the same precision reach over more than a second.
FLOPs are those the model needs (vora.train.plan.flops), as PaLM counts them: 2 per weight and token forward, backward
2 more where a weight is frozen and 4 where it trains; logits where a label is; the teacher forward. Attention is that
of each sample by itself. Padding and blocks computed again do not count.

Ours is measured first and reported at once; then the original, when ours has left the memory.

    python benchmarks/large_step.py --size qwen2.5-7b --json large_step.json
"""

import gc
import sys
from statistics import median

import contestants
import torch
from rows import arguments, parser_of, peak_bytes, report, restart_peak, row, seconds, spread
from where_time_goes import profiled, seconds_by_kind, table

from vora.train.plan.flops import Row, sequence_flops


def product_ceiling(side, dtype=torch.bfloat16, at_least=1.5):
    """FLOP/s of products of two `side` x `side` matrices, one after the other for so many seconds: chips that start
    faster than they can go on for long are caught."""
    left, right = (torch.randn(side, side, device=contestants.device(), dtype=dtype) for _ in range(2))
    product = left @ right

    def some():
        for _ in range(20):
            torch.matmul(left, right, out=product)

    times = [seconds(some)]
    while sum(times) < at_least:
        times.append(seconds(some))
    return 20 * 2 * side**3 / median(times[len(times) // 2 :])


def needed_flops(objective, samples):
    """FLOPs of a training step on some samples of `share_prefixes`, each by itself."""
    return sum(sequence_flops(objective, as_row(sample))["total"] for sample in samples)


def as_row(sample):
    num_images, num_patches = len(sample["image_grid_thw"]), sample["image_grid_thw"].prod(-1).sum()
    num_labels = (sample["targets"] != -100).sum()
    return Row(len(sample["input_ids"]), num_images, float(num_patches) / num_images, int(num_labels))


def take_steps(variant, size, batches, dtype, args):
    """{seconds: list, of passes over all batches; peak: bytes; by_kind: {kind of work: seconds of such a pass}; model:
    itself} of one contestant. Prints the operations that take most."""
    contestant = contestants.Contestant(variant, size, batches, dtype, args.attn)
    if args.checkpointing:
        contestant.llm.gradient_checkpointing_enable({"use_reentrant": False})
    restart_peak()
    for _ in range(2):
        contestant()
    times = [seconds(contestant) for _ in range(args.rounds)]
    peak, events = peak_bytes(), profiled(contestant)
    print(f"Where the time of {variant} goes:\n{table(events)}")
    by_kind = seconds_by_kind(events)
    if torch.cuda.is_available():
        by_kind["no kernel running"] = max(0.0, median(times) - sum(by_kind.values()))
    return {"seconds": times, "peak": peak, "by_kind": by_kind, "model": contestant.model}


def measured(size, dtype, args):
    """Rows, as they come."""
    samples, sequences = contestants.full_sequences(size, args.sequence_length, args.sequences, args.scale == "pixels")
    packed = [sample for sequence in sequences for sample in sequence]
    num_image_tokens = sum(int(sample["image_grid_thw"].prod(-1).sum()) for sample in packed) / len(packed)
    again = ", blocks computed again" if args.checkpointing else ""
    name = f"{args.size}, {args.dtype}, {args.attn}{again}, {len(samples)} images of {num_image_tokens:.0f} tokens"
    ceiling = product_ceiling(args.ceiling_side, dtype)
    batches = contestants.batches_of_sequences(sequences, size, args.sequence_length, args.sequences_per_batch)
    ours = take_steps("ours", size, batches, dtype, args)
    objective = ours.pop("model")
    flops, took = needed_flops(objective, packed), median(ours["seconds"])
    yield row(
        f"{name}: against products of {args.ceiling_side}^3",
        flops / took,
        ceiling,
        "FLOP/s",
        samples_per_second=len(samples) / took,
        peak_bytes=ours["peak"],
        flops_per_sample=flops / len(samples),
        seconds_by_kind=ours["by_kind"],
        trained_parameters=sum(p.numel() for p in objective.parameters() if p.requires_grad),
        noise={"ours": spread(ours["seconds"])},
    )
    del objective
    gc.collect()
    torch.cuda.empty_cache()
    variants = {"ours": ours}
    if not args.no_baseline:
        try:
            batches = contestants.original_batches(samples, size, args.batch)
            variants["original"] = take_steps("original", size, batches, dtype, args)
        except torch.OutOfMemoryError as error:
            print(f"The original does not fit: {error}", file=sys.stderr)
    original = variants.get("original")
    noise = {variant: spread(found["seconds"]) for variant, found in variants.items()}
    plain_rate = len(samples) / median(original["seconds"]) if original else None
    yield row(f"{name}: train step", len(samples) / took, plain_rate, "samples/s", noise=noise)
    yield row(f"{name}: peak memory", ours["peak"], original["peak"] if original else None, "bytes")
    for kind in ours["by_kind"]:
        of_kind = {variant: 1000 * found["by_kind"][kind] / len(samples) for variant, found in variants.items()}
        yield row(f"{name}: {kind}", of_kind["ours"], of_kind.get("original"), "ms/sample")


def main():
    parser = parser_of(__doc__)
    contestants.add_steps(parser, "qwen2.5-7b", "tokens", sequence_length=2304, sequences=2, rounds=5)
    parser.add_argument("--ceiling-side", type=int, default=8192)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=contestants.default_dtype())
    parser.add_argument("--attn", default="sdpa")
    parser.add_argument("--checkpointing", action="store_true", help="both compute blocks again in the backward pass")
    parser.add_argument("--no-baseline", action="store_true")
    args = arguments(parser)
    report(measured(contestants.SIZES[args.size], getattr(torch, args.dtype), args), args.json)


if __name__ == "__main__":
    main()
