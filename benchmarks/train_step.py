"""Training steps a second: ours against the plain original, on the same images and the same text.

The original pads each image to a black square and each row to the longest, adds a dense float mask made token by
token, computes logits for every place and keeps all hidden states: on a CPU in float32, on a GPU in bfloat16, as its
recipe does. Ours packs images without bars, computes logits where a label is, and in bfloat16 where that is faster.
Both keep what trains in float32 and end each step with AdamW.

By default each image is as large as it is inside the square; with `--scale tokens` it fills as many tokens as the
square has. With `--questions` each has several short ones: a row each in the original; ours lets them share the image.

Then a check in float32 on square images: `lm_loss` agrees, and so does the distillation loss once the pairing is
equalised: the levels 1, 2, ... of the original (level 0 compares what enters the first blocks, which ours leaves out)
against the pairs (0, 0), (1, 1), ... of ours, without subtracting the mean feature.

    python benchmarks/train_step.py --json train_step.json
"""

from itertools import islice
from statistics import median

import torch
from contestants import (
    ANSWER_TOKENS,
    SIZES,
    Contestant,
    add_precisions,
    add_steps,
    batches_of_sequences,
    build_original,
    build_ours,
    endless_samples,
    full_sequences,
    original_batches,
    our_sample,
    share_weights,
    squared,
)
from rows import alternate, arguments, compared, parser_of, report, row, seconds

SHORT_ANSWER_TOKENS = (2, 8)  # where there are several questions


def losses_in_float32(size, attn="sdpa", num_samples=2):
    """Rows of both losses on identical square images, with the pairing equalised."""
    torch.backends.cudnn.allow_tf32 = False  # or a GPU rounds the original's convolution to 10 bits
    samples = squared(list(islice(endless_samples(size), num_samples)), size.image_size)
    pairs = [(block, block) for block in range(min(size.num_blocks, size.teacher["num_hidden_layers"]) - 1)]
    objective, original = build_ours(size, attn=attn, pairs=pairs, center=False), build_original(size)
    share_weights(original, objective)
    ours = [our_sample(sample, size) for sample in samples]
    sequence_length = sum(len(sample["input_ids"]) for sample in ours)
    with torch.no_grad():
        (packed,) = batches_of_sequences([ours], size, sequence_length, 1)
        (batch,) = original_batches(samples, size, num_samples)
        ours, theirs = objective(**packed), original(**batch)["metrics"]
    levels = [theirs[f"loss_aux_layer_{block + 1}"] for block, _ in pairs]
    what = f"in float32, {attn}, square images"
    yield row(f"lm_loss {what}", float(ours["lm_loss"]), theirs["llm_loss"], "nats")
    yield row(f"distill_loss {what}", float(ours["distill_loss"]), sum(levels) / len(levels), "1 - cos")


def compare_steps(size, args):
    """The row of samples a second."""
    ours, plain = getattr(torch, args.our_dtype), getattr(torch, args.baseline_dtype)
    answers = ANSWER_TOKENS if args.questions == 1 else SHORT_ANSWER_TOKENS
    samples, sequences = full_sequences(
        size, args.sequence_length, args.sequences, args.scale == "pixels", answers, args.questions
    )
    packed = batches_of_sequences(sequences, size, args.sequence_length, args.sequences_per_batch)
    contestants = {
        "ours": Contestant("ours", size, packed, ours, args.attn, args.compile),
        "original": Contestant("original", size, original_batches(samples, size, args.batch), plain, args.attn),
    }
    starts = {name: seconds(contestant) for name, contestant in contestants.items()}
    times = alternate(contestants, args.rounds, warmups=0)
    num_tokens = sum(len(sample["input_ids"]) for sequence in sequences for sample in sequence)
    num_questions = args.questions * len(samples)
    compiled = f", ours compiled in {starts['ours'] - median(times['ours']):.0f} s" if args.compile else ""
    answers_of_one = "a caption each" if args.questions == 1 else f"{args.questions} questions each"
    precisions = f"{args.our_dtype} against {args.baseline_dtype}{compiled}"
    return compared(
        f"train step, {args.size}, {answers_of_one}, same {args.scale}, {precisions}",
        times,
        "samples/s",
        lambda seconds: num_questions / seconds,
        first_round_seconds=starts,
        num_samples=num_questions,
        sequence_fill=num_tokens / args.sequence_length / args.sequences,
        tokens_per_sample=num_tokens / num_questions,
    )


def main():
    parser = parser_of(__doc__)
    add_steps(parser, "smollm2-135m", "pixels", sequence_length=512, sequences=4, rounds=3)
    parser.add_argument("--questions", type=int, default=1, help="to each image; with 1 it has a caption")
    add_precisions(parser)
    parser.add_argument("--compile", action="store_true", help="our blocks, as training.torch_compile does")
    parser.add_argument("--only", choices=("steps", "check"), help="leave out the other; both by default")
    args = arguments(parser)
    size = SIZES[args.size]

    def rows():
        if args.only != "check":
            yield compare_steps(size, args)
        if args.only != "steps":
            yield from losses_in_float32(size, args.attn)

    for one in report(rows(), args.json):
        if "in float32" in one["name"] and abs(one["ours"] - one["baseline"]) > 1e-3:
            raise SystemExit(f"{one['name']} differs: {one['ours']} and {one['baseline']}.")


if __name__ == "__main__":
    main()
