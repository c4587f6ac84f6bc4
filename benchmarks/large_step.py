"""A training step at the size of the released model: FLOP/s against a measured ceiling, memory, where time goes.

The ceiling is measured: the fastest of some products of large matrices in bfloat16. FLOPs are those the model needs:
2 per weight and token forward; backward 2 more where a weight is frozen and 4 where it trains; logits at labels only;
attention over the pairs of tokens that see each other; the teacher forward. Recomputation and padding do not count.
The original runs after ours, when ours has left the memory.

    python benchmarks/large_step.py --size qwen2.5-7b --json large_step.json
"""

import gc
from statistics import median

import torch
from contestants import (
    SIZES,
    batches_of_rows,
    build_original,
    build_ours,
    default_dtype,
    device,
    full_rows,
    optimizer_of,
    original_batches,
    train_step,
)
from rows import arguments, parser_of, peak_bytes, report, restart_peak, row, seconds, spread
from torch import nn
from torch.profiler import ProfilerActivity, profile


def product_ceiling(side, dtype=torch.bfloat16, rounds=10):
    """FLOP/s of the fastest of some products of two `side` x `side` matrices."""
    left, right = (torch.randn(side, side, device=device(), dtype=dtype) for _ in range(2))
    left @ right
    return 2 * side**3 / min(seconds(lambda: left @ right) for _ in range(rounds))


def linear_weights(module):
    """(frozen, trained) weights of its linear layers."""
    weights = [part.weight for part in module.modules() if isinstance(part, nn.Linear)]
    return tuple(sum(w.numel() for w in weights if w.requires_grad == trains) for trains in (False, True))


def real_tokens(batch):
    """bool[B, T], False at padding, which alone is seen by none but itself and predicts nothing."""
    places = torch.arange(batch["seen_until"].shape[1], device=batch["seen_until"].device)
    return (batch["seen_until"] > places) | (batch["targets"] != -100)


def num_pairs(batch):
    """Pairs of tokens of a packed batch of which one sees the other."""
    places = torch.arange(batch["seen_until"].shape[1], device=batch["seen_until"].device)
    causal = (batch["seen_until"] - places + 1)[real_tokens(batch)].sum()
    num_patches = batch["image_grid_thw"].prod(-1)
    return float(causal) + float((num_patches * (num_patches - 1) / 2).sum())  # within an image the later ones too


def model_flops(learner, batch):
    """FLOPs of one training step of a `VisionLearner` on a packed batch."""
    blocks, text = learner.vora.model.blocks, learner.config.get_text_config()
    teacher = learner.teacher.vit
    num_tokens, num_labels = int(real_tokens(batch).sum()), int((batch["targets"] != -100).sum())
    num_patches = len(batch["pixel_values"])
    frozen, trained = linear_weights(blocks)
    _, eyes = linear_weights(learner.vora.model.patch_embedding)  # PEFT keeps a frozen copy, which does not run
    _, heads = linear_weights(learner.distillation)
    pixels = batch["pixel_values"].shape[1] * learner.config.vision_hidden_size  # no gradient flows into pixels
    width = text.num_attention_heads * (
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    )
    flops = (4 * frozen + 6 * trained) * num_tokens
    flops += 4 * text.vocab_size * text.hidden_size * num_labels
    flops += 12 * width * num_pairs(batch) * len(blocks)
    flops += (6 * (eyes + heads) - 2 * pixels) * num_patches
    flops += 2 * sum(linear_weights(teacher)) * num_patches
    patches_of_image = batch["image_grid_thw"].prod(-1).float()
    return flops + 4 * teacher.config.hidden_size * teacher.config.num_hidden_layers * float(
        (patches_of_image**2).sum()
    )


def run(model, batches, dtype, rounds, fused):
    """(list of seconds of a pass over all batches, peak bytes, the optimizer)."""
    restart_peak()
    optimizer = optimizer_of(model, fused)

    def all_batches():
        for batch in batches:
            train_step(model, batch, optimizer, dtype)

    for _ in range(2):
        all_batches()
    return [seconds(all_batches) for _ in range(rounds)], peak_bytes(), optimizer


def profile_table(model, batch, optimizer, dtype, num_lines=25):
    """Where one step's time goes."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=kinds) as profiled:
        train_step(model, batch, optimizer, dtype)
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return profiled.key_averages().table(sort_by=key, row_limit=num_lines, max_name_column_width=60)


def checkpoint_blocks(learner):
    """Recompute each block of the LLM in the backward pass."""
    learner.vora.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--size", choices=SIZES, default="qwen2.5-7b")
    parser.add_argument("--row-tokens", type=int, default=2304)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--rows-per-batch", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="pictures in a step of the original")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ceiling-side", type=int, default=8192)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=default_dtype())
    parser.add_argument("--attn", default="sdpa")
    parser.add_argument("--checkpointing", action="store_true", help="ours recomputes blocks in the backward pass")
    parser.add_argument("--no-baseline", action="store_true")
    args = arguments(parser)
    size, dtype = SIZES[args.size], getattr(torch, args.dtype)
    ceiling = product_ceiling(args.ceiling_side, dtype)
    samples, rows = full_rows(size, args.row_tokens, args.rows)
    packed = batches_of_rows(rows, size, args.row_tokens, args.rows_per_batch)

    learner = build_ours(size, dtype, args.attn)
    if args.checkpointing:
        checkpoint_blocks(learner)
    times, peak, optimizer = run(learner, packed, dtype, args.rounds, fused=True)
    flops = sum(model_flops(learner, batch) for batch in packed)
    table = profile_table(learner, packed[0], optimizer, dtype)
    print(table)
    del learner, optimizer
    gc.collect()
    torch.cuda.empty_cache()

    plain_rate, plain_peak, noise = None, None, {"ours": spread(times)}
    if not args.no_baseline:
        original = build_original(size, dtype)
        plain_times, plain_peak, _ = run(
            original, original_batches(samples, size, args.batch), dtype, args.rounds, False
        )
        plain_rate, noise["original"] = len(samples) / median(plain_times), spread(plain_times)
    name = f"train step, {args.size}, {args.dtype}, {args.attn}"
    report(
        [
            row(name, len(samples) / median(times), plain_rate, "samples/s", noise=noise, num_samples=len(samples)),
            row(f"{name}: against products of {args.ceiling_side}^3", flops / median(times), ceiling, "FLOP/s"),
            row(f"{name}: peak memory", peak, plain_peak, "bytes"),
        ],
        args.json,
    )


if __name__ == "__main__":
    main()
