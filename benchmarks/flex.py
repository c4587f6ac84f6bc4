"""Does flex_attention compute what sdpa computes? Losses and gradients of one packed batch, in float32 and bfloat16.

In bfloat16 both are compared with sdpa in float32: flex may be no further from it than twice as far as sdpa is. On a
CPU only losses are compared, for flex_attention has no backward pass there.

    python benchmarks/flex.py --json flex.json
"""

import torch
from contestants import SIZES, batches_of_rows, build_ours, device, full_rows
from rows import arguments, parser_of, report, row

ROW_TOKENS = 256


def losses_and_gradient(size, batch, attn, dtype):
    """({loss: float}, gradients as one float32 vector, or None without a backward pass)."""
    learner = build_ours(size, dtype, attn)
    torch.manual_seed(2)
    for name, parameter in learner.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    backward = device().type == "cuda"
    with (
        torch.autocast(device().type, torch.bfloat16, enabled=dtype == torch.bfloat16),
        torch.set_grad_enabled(backward),
    ):
        found = learner(**batch)
    losses = {name: float(found[name]) for name in ("lm_loss", "distill_loss")}
    if not backward:
        return losses, None
    found["loss"].backward()
    return losses, torch.cat([p.grad.float().flatten() for p in learner.parameters() if p.grad is not None])


def compare(size, batch):
    """Rows of the largest difference from sdpa in float32: of flex, and of sdpa in the same precision."""
    exact, gradient = losses_and_gradient(size, batch, "sdpa", torch.float32)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        losses, slopes = losses_and_gradient(size, batch, "flex_attention", dtype)
        other, other_slopes = losses_and_gradient(size, batch, "sdpa", dtype)
        kind = str(dtype).removeprefix("torch.")

        def differences(values, vector):
            yield max(abs(values[name] - exact[name]) for name in exact)
            if vector is not None:
                yield float((vector - gradient).norm() / gradient.norm())

        for what, ours, theirs in zip(
            ("losses", "gradient"), differences(losses, slopes), differences(other, other_slopes)
        ):
            yield row(f"{what} in {kind}: distance from sdpa in float32", ours, theirs, "absolute or relative")
            if ours > max(tolerance, 2 * theirs):
                raise SystemExit(f"flex_attention in {kind}: {what} are off by {ours}, sdpa's by {theirs}.")


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--size", choices=SIZES, default="toy")
    args = arguments(parser)
    size = SIZES[args.size]
    _, rows = full_rows(size, ROW_TOKENS, 2)
    report(list(compare(size, batches_of_rows(rows, size, ROW_TOKENS, 2)[0])), args.json)


if __name__ == "__main__":
    main()
