"""Peak memory of a training step on images in the usual sizes, ours against the original.

Each contestant runs in processes of its own, in turn: resident memory on a CPU (VmHWM), allocated memory on a GPU. How
both grow is in growth.py.

    python benchmarks/memory.py --json memory.json
"""

from statistics import median

import contestants
import torch
from own_process import in_own_process, taken_by
from rows import arguments, parser_of, report, row, spread

VARIANTS = ("ours", "original")


def figures(variant, size_name, sequence_length, num_sequences, dtype, attn):
    """What `taken_by` says of training steps of one contestant on the images that fill some sequences of ours."""
    size, dtype = contestants.SIZES[size_name], getattr(torch, dtype)
    samples, sequences = contestants.full_sequences(size, sequence_length, num_sequences)
    if variant == "ours":
        model = contestants.build_ours(size, dtype, attn)
        (batch,) = contestants.batches_of_sequences(sequences, size, sequence_length, num_sequences)
    else:
        model = contestants.build_original(size, dtype)
        (batch,) = contestants.original_batches(samples, size, len(samples))
    optimizer = contestants.optimizer_of(model, fused=variant == "ours")
    return taken_by(lambda: contestants.train_step(model, batch, optimizer, dtype)) | {"num_samples": len(samples)}


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--size", choices=contestants.SIZES, default="smollm2-135m")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each")
    contestants.add_precisions(parser)
    args = arguments(parser)
    dtypes = {"ours": args.our_dtype, "original": args.baseline_dtype}
    found = {variant: [] for variant in VARIANTS}
    for _ in range(args.rounds):
        for variant in VARIANTS:
            settings = (args.size, args.sequence_length, args.sequences, dtypes[variant], args.attn)
            found[variant].append(in_own_process(figures, variant, *settings))
    images = found["ours"][0]["num_samples"]
    what = f"train step, {args.size}, {images} images, {args.our_dtype} against {args.baseline_dtype}"
    peaks = {variant: [one["peak"] for one in found[variant]] for variant in VARIANTS}
    above = {variant: [one["peak"] - one["resting"] for one in found[variant]] for variant in VARIANTS}
    report(
        [
            row(
                f"{what}: {name}",
                *(median(values[variant]) for variant in VARIANTS),
                "bytes",
                noise={variant: spread(values[variant]) for variant in VARIANTS},
            )
            for name, values in {"peak memory": peaks, "memory above the model at rest": above}.items()
        ],
        args.json,
    )


if __name__ == "__main__":
    main()
