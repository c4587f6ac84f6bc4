"""Peak memory of a training step on images in the usual sizes, ours against the original.

Each contestant runs in processes of its own, in turn: resident memory on a CPU (VmHWM), allocated memory on a GPU.

    python benchmarks/memory.py --json memory.json
"""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from statistics import median

import contestants
import torch
from rows import arguments, parser_of, peak_bytes, report, restart_peak, row, spread

VARIANTS = ("ours", "original")
NUM_STEPS = 2  # the first makes what the optimizer keeps


def in_own_process(work, *args):
    """What a function of a module returns in a new process, on as many threads.

    It is forked from one that has imported everything and done nothing else, so that the peak of memory is its alone,
    without pages of libraries that it never touches.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # for what that process imports
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # it may ask for a GPU, but not start it
    context, threads = multiprocessing.get_context("forkserver"), torch.get_num_threads()
    context.set_forkserver_preload(["contestants"])
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (threads,)) as pool:
        return pool.submit(work, *args).result()


def figures(variant, size_name, sequence_length, num_sequences, dtype, attn):
    """(bytes held before training steps, most bytes during them, number of images) of one contestant."""
    size = contestants.SIZES[size_name]
    samples, sequences = contestants.full_sequences(size, sequence_length, num_sequences)
    if variant == "ours":
        batches = contestants.batches_of_sequences(sequences, size, sequence_length, num_sequences)
    else:
        batches = contestants.original_batches(samples, size, len(samples))
    contestant = contestants.Contestant(variant, size, batches, getattr(torch, dtype), attn)
    resting = restart_peak()
    for _ in range(NUM_STEPS):
        contestant()
    return resting, peak_bytes(), len(samples)


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--size", choices=contestants.SIZES, default="smollm2-135m")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each")
    contestants.add_precisions(parser)
    args = arguments(parser)
    dtypes = {"ours": args.our_dtype, "original": args.baseline_dtype}
    settings = (args.size, args.sequence_length, args.sequences)
    peaks, above = ({variant: [] for variant in VARIANTS} for _ in range(2))
    for _ in range(args.rounds):
        for variant in VARIANTS:
            resting, peak, num_images = in_own_process(figures, variant, *settings, dtypes[variant], args.attn)
            peaks[variant].append(peak)
            above[variant].append(peak - resting)
    what = f"train step, {args.size}, {num_images} images, {args.our_dtype} against {args.baseline_dtype}"
    rows = []
    for name, values in {"peak memory": peaks, "memory above the model at rest": above}.items():
        noise = {variant: spread(values[variant]) for variant in VARIANTS}
        rows.append(row(f"{what}: {name}", *(median(values[v]) for v in VARIANTS), "bytes", noise=noise))
    report(rows, args.json)


if __name__ == "__main__":
    main()
