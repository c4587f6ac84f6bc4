"""Peak memory of a training step on pictures in the usual sizes, ours against the original.

Each contestant runs in processes of its own, in turn: resident memory on a CPU (VmHWM), allocated memory on a GPU. How
both grow is in growth.py.

    python benchmarks/memory.py --json memory.json
"""

from statistics import median

import torch
from contestants import (
    SIZES,
    batches_of_rows,
    build_original,
    build_ours,
    default_attention,
    default_dtype,
    full_rows,
    optimizer_of,
    original_batches,
    train_step,
)
from own_process import in_own_process, taken_by
from rows import arguments, parser_of, report, row, spread

ARMS = ("ours", "original")


def figures(arm, size_name, row_tokens, num_rows, dtype, attn):
    """What `taken_by` says of training steps of one contestant on the pictures that fill some rows of ours."""
    size, dtype = SIZES[size_name], getattr(torch, dtype)
    samples, rows = full_rows(size, row_tokens, num_rows)
    if arm == "ours":
        model = build_ours(size, dtype, attn)
        (batch,) = batches_of_rows(rows, size, row_tokens, num_rows)
    else:
        model = build_original(size, dtype)
        (batch,) = original_batches(samples, size, len(samples))
    optimizer = optimizer_of(model, fused=arm == "ours")
    return taken_by(lambda: train_step(model, batch, optimizer, dtype)) | {"num_samples": len(samples)}


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--size", choices=SIZES, default="smollm2-135m")
    parser.add_argument("--row-tokens", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each")
    parser.add_argument("--our-dtype", choices=("float32", "bfloat16"), default=default_dtype())
    plain = "bfloat16" if torch.cuda.is_available() else "float32"
    parser.add_argument("--baseline-dtype", choices=("float32", "bfloat16"), default=plain)
    parser.add_argument("--attn", default=default_attention(), help="of ours")
    args = arguments(parser)
    dtypes = {"ours": args.our_dtype, "original": args.baseline_dtype}
    found = {arm: [] for arm in ARMS}
    for _ in range(args.rounds):
        for arm in ARMS:
            settings = (args.size, args.row_tokens, args.rows, dtypes[arm], args.attn)
            found[arm].append(in_own_process(figures, arm, *settings))
    pictures = found["ours"][0]["num_samples"]
    what = f"train step, {args.size}, {pictures} pictures, {args.our_dtype} against {args.baseline_dtype}"
    peaks = {arm: [one["peak"] for one in found[arm]] for arm in ARMS}
    above = {arm: [one["peak"] - one["resting"] for one in found[arm]] for arm in ARMS}
    report(
        [
            row(
                f"{what}: {name}",
                *(median(values[arm]) for arm in ARMS),
                "bytes",
                noise={arm: spread(values[arm]) for arm in ARMS},
            )
            for name, values in {"peak memory": peaks, "memory above the model at rest": above}.items()
        ],
        args.json,
    )


if __name__ == "__main__":
    main()
