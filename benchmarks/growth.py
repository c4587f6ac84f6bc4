"""How time and memory grow with image tokens and with the batch: a training step, and the prefill of a merged model.

Square images, for the original takes no others, with some text tokens to each; then batches of them. Each contestant
runs in a process of its own (see own_process.py), ours and the original in turn. One whose work took longer than
--longest is given no larger size, and its rows are empty from there.

What to expect: linear layers cost as many times more as there are tokens (exponent 1), attention the square of that
(2). Weights, the optimizer's step and Python cost the same at any size, so small sizes grow by less than 1. One
exponent over all sizes would hide this: there is one for the smaller sizes and one for the larger, beside that of the
counted FLOPs, and the share of the square at the largest size, from the c + a n + b n^2 that fits best.

    python benchmarks/growth.py --json growth.json
"""

import sys
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import contestants
import numpy as np
import torch
from original import IMAGE
from own_process import in_own_process, taken_by
from prefill_decode import Prefill, prompt_of
from rows import arguments, parser_of, report, row

from vora.distill.objective import Objective
from vora.train.plan.flops import Row, sequence_flops

VARIANTS = ("ours", "original")
ANSWER_TOKENS = (24, 25)  # of each training sample
NUM_TEXT_TOKENS = 32  # of each prompt


@dataclass(frozen=True)
class Setting:
    """Of all figures of a run: the models' size, the precision of each variant, the attention of ours in training."""

    size: str
    dtypes: dict
    attn: str


def figures(variant, work, side, batch, setting):
    """What one contestant takes for a batch of images of `side` x `side` tokens: see `taken_by`; ours also says how
    many FLOPs it needs."""
    size = replace(contestants.SIZES[setting.size], image_size=contestants.PATCH * side)
    dtype = getattr(torch, setting.dtypes[variant])
    call, flops = WORKS[work][variant](size, batch, dtype, setting)
    return taken_by(call) | {"flops": flops}


def our_step(size, batch, dtype, setting):
    samples = [contestants.our_sample(sample, size) for sample in training_samples(size, batch)]
    objective = contestants.build_ours(size, dtype, setting.attn)
    lengths = [len(sample["input_ids"]) for sample in samples]
    (packed,) = contestants.batches_of_sequences([[sample] for sample in samples], size, max(lengths), batch)
    optimizer = contestants.optimizer_of(objective, fused=True)
    num_patches, num_labels = (size.image_size // contestants.PATCH) ** 2, ANSWER_TOKENS[0]
    flops = sum(sequence_flops(objective, Row(length, 1, num_patches, num_labels))["total"] for length in lengths)
    return lambda: contestants.train_step(objective, packed, optimizer, dtype), flops


def original_step(size, batch, dtype, setting):
    (padded,) = contestants.original_batches(training_samples(size, batch), size, batch)
    model = contestants.build_original(size, dtype)
    optimizer = contestants.optimizer_of(model, fused=False)
    return lambda: contestants.train_step(model, padded, optimizer, dtype), None


def training_samples(size, batch):
    return contestants.squared(contestants.make_samples(batch, size, ANSWER_TOKENS), size.image_size)


def our_prefill(size, batch, dtype, setting):
    vora, prompt = contestants.random_vora(size, dtype), prompt_of(size, batch, NUM_TEXT_TOKENS)
    num_patches = (size.image_size // contestants.PATCH) ** 2
    one = sequence_flops(Objective(vora, None), Row(num_patches + NUM_TEXT_TOKENS, 1, num_patches, 1))
    return Prefill(vora, **prompt), batch * one["student_forward"]


def original_prefill(size, batch, dtype, setting):
    model = contestants.merged_original(size, dtype)
    ids = torch.randint(3, 100, (batch, NUM_TEXT_TOKENS + 1), device=contestants.device())
    ids[:, 2] = IMAGE
    frames = torch.randn(batch, 3, size.image_size, size.image_size, device=contestants.device(), dtype=dtype)
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "frames": frames}
    return torch.inference_mode()(lambda: model.prefill(**prompt)), None


WORKS = {
    "train step": {"ours": our_step, "original": original_step},
    "prefill": {"ours": our_prefill, "original": original_prefill},
}


def growth(work, name, sizes, points, setting, longest):
    """Rows of time and peak memory for each size as they come, then those that say how they grow.

    Args:
        name: of what grows.
        sizes: how much of it.
        points: to each size the arguments `side` and `batch` of `figures`.
    """
    found = {variant: [] for variant in VARIANTS}
    for size, point in zip(sizes, points):
        for variant in VARIANTS:
            found[variant].append(next_figures(found[variant], variant, work, *point, setting, longest))
        ours, original = (found[variant][-1] or {} for variant in VARIANTS)
        what = f"{work}, {size:,} {name}"
        yield row(f"{what}: time", ours.get("seconds"), original.get("seconds"), "s", flops=ours.get("flops"))
        rest = {"resting": {"ours": ours.get("resting"), "original": original.get("resting")}}
        yield row(f"{what}: peak memory", ours.get("peak"), original.get("peak"), "bytes", **rest)
    yield from laws(work, name, sizes, found)


def next_figures(earlier, variant, work, side, batch, setting, longest):
    """`figures` from a process of its own, or None where the next smaller size took too long or the process died."""
    if earlier and (earlier[-1] is None or earlier[-1]["seconds"] > longest):
        return None
    try:
        return in_own_process(figures, variant, work, side, batch, setting)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return None


def laws(work, name, sizes, found):
    """Rows of exponents of time and of memory above rest, and of the quadratic share where there are sizes enough."""
    values = {"time": lambda one: one["seconds"], "memory above rest": lambda one: one["peak"] - one["resting"]}
    costs = {
        what: {variant: costs_of(sizes, found[variant], value) for variant in VARIANTS}
        for what, value in values.items()
    }
    flops = costs_of(sizes, found["ours"], lambda one: one["flops"])
    for what, costs_of_variant in costs.items():
        for part in halves(sizes):
            both = [size for size in part if all(size in costs_of_variant[variant] for variant in VARIANTS)]
            part = both if len(both) > 1 else [size for size in part if size in costs_of_variant["ours"]]
            if len(part) > 1:
                fitted = [exponent_of(part, costs_of_variant[variant]) for variant in VARIANTS]
                expected = exponent_of(part, flops)
                beside = f", that of FLOPs {expected:.2f}" if what == "time" else ""
                title = f"{work}: exponent of {what}, {part[0]:,} to {part[-1]:,} {name}{beside}"
                steps = {
                    variant: [exponent_of(pair, costs_of_variant[variant]) for pair in pairwise(part)]
                    for variant in VARIANTS
                }
                yield row(title, *fitted, "exponent", flops=expected, between_neighbours=steps)
        if len(sizes) > 4:
            yield from shares(work, name, what, costs_of_variant, flops)


def shares(work, name, what, costs_of_variant, flops):
    """The row of the quadratic share at the largest size that both have, if each has three or more."""
    common = sorted(set.intersection(*(set(costs) for costs in costs_of_variant.values())))
    if len(common) > 2 and all(min(costs.values()) > 0 for costs in costs_of_variant.values()):
        fits = {variant: split(list(costs), list(costs.values())) for variant, costs in costs_of_variant.items()}
        at_largest = [quadratic_share(fits[variant], common[-1]) for variant in VARIANTS]
        expected = quadratic_share(split(list(flops), list(flops.values())), common[-1])
        beside = f", in FLOPs {expected:.2f}" if what == "time" else ""
        title = f"{work}: share of the square in {what} at {common[-1]:,} {name}{beside}"
        yield row(title, *at_largest, "share", flops=expected, fixed_linear_quadratic=fits)


def costs_of(sizes, found, value):
    """{size: value} where there are figures."""
    return {size: value(one) for size, one in zip(sizes, found) if one is not None}


def exponent_of(sizes, costs):
    return exponent(sizes, [costs[size] for size in sizes]) if set(sizes) <= set(costs) else None


def halves(sizes):
    """The smaller sizes and the larger, with the one in the middle in both; all together where they are few."""
    middle = len(sizes) // 2
    return [sizes[: middle + 1], sizes[middle:]] if len(sizes) > 4 else [sizes]


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--size", choices=contestants.SIZES, default="smollm2-135m")
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument(
        "--sides", type=int, nargs="*", default=[8, 11, 16, 23, 32, 45, 64], help="patches along a side of an image"
    )
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8], help="images at once")
    parser.add_argument("--batch-side", type=int, default=16, help="of images while the batch grows")
    parser.add_argument("--longest", type=float, default=25, help="seconds; who took longer gets no larger size")
    contestants.add_precisions(parser)
    args = arguments(parser)

    def rows():
        for work in args.work:
            baseline = args.baseline_dtype if work == "train step" else args.our_dtype
            setting = Setting(args.size, {"ours": args.our_dtype, "original": baseline}, args.attn)
            tokens = [side**2 for side in args.sides]
            points = [(side, 1) for side in args.sides]
            yield from growth(work, "image tokens", tokens, points, setting, args.longest)
            name = f"images of {args.batch_side**2} tokens"
            points = [(args.batch_side, batch) for batch in args.batches]
            yield from growth(work, name, args.batches, points, setting, args.longest)

    report(rows(), args.json)


def exponent(sizes, values):
    """Slope of log value against log size; None where there are not two of them above zero."""
    if len(sizes) < 2 or min(values) <= 0:
        return None
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def split(sizes, values):
    """Coefficients (c, a, b), none below zero, for which c + a size + b size^2 misses the values by the least in
    proportion.

    Raises:
        ValueError: there are fewer than three sizes, or a value is not above zero.
    """
    if len(sizes) < 3 or min(values) <= 0:
        raise ValueError(f"{len(sizes)} sizes, the smallest value {min(values)}: a split needs three above 0.")
    powers = np.stack([np.array(sizes, float) ** power for power in range(3)], 1) / np.array(values, float)[:, None]
    best = None
    for kept in (list(some) for count in (1, 2, 3) for some in combinations(range(3), count)):
        scale = powers[:, kept].max(0)  # else squares of thousands would hide the constant
        found = np.linalg.lstsq(powers[:, kept] / scale, np.ones(len(sizes)), rcond=None)[0] / scale
        missed = float(((powers[:, kept] @ found - 1) ** 2).sum())
        if (found >= 0).all() and (best is None or missed < best[0]):
            best = (missed, dict(zip(kept, found.tolist())))
    return tuple(best[1].get(power, 0.0) for power in range(3))


def quadratic_share(coefficients, size):
    """What part of the cost at a size is the quadratic one."""
    fixed, linear, quadratic = coefficients
    whole = fixed + linear * size + quadratic * size**2
    return quadratic * size**2 / whole


if __name__ == "__main__":
    main()
