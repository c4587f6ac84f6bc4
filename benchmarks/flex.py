"""Does flex_attention compute what sdpa computes? Losses and gradients of one packed batch, in float32 and bfloat16.

In bfloat16 both are compared with sdpa in float32: flex may be no further from it than twice as far as sdpa is. On a
CPU only losses are compared, for flex_attention has no backward pass there.

    python benchmarks/flex.py --json flex.json
"""

import torch
from contestants import SIZES, batches_of_sequences, build_ours, device, full_sequences
from rows import arguments, parser_of, report, row

SEQUENCE_TOKENS = 256
# How far from sdpa in float32 is near enough: losses absolute, the gradient relative; or twice as far as sdpa is
TOLERANCES = {
    torch.float32: {"losses": 1e-4, "gradient": 1e-3},
    torch.bfloat16: {"losses": 2e-2, "gradient": 2e-2},
}


def losses_and_gradient(size, batch, attn, dtype):
    """({loss: float}, gradients as one float32 vector, or None without a backward pass)."""
    objective = build_ours(size, dtype, attn)
    torch.manual_seed(2)
    for name, parameter in objective.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    backward = device().type == "cuda"
    with (
        torch.autocast(device().type, torch.bfloat16, enabled=dtype == torch.bfloat16),
        torch.set_grad_enabled(backward),
    ):
        found = objective(**batch)
    losses = {name: float(found[name]) for name in ("lm_loss", "distill_loss")}
    if not backward:
        return losses, None
    found["loss"].backward()
    return losses, torch.cat([p.grad.float().flatten() for p in objective.parameters() if p.grad is not None])


def compare(size, batch):
    """Rows of the largest difference from sdpa in float32: of flex, and of sdpa in the same precision."""
    exact, gradient = losses_and_gradient(size, batch, "sdpa", torch.float32)

    def differences(values, vector):
        found = {"losses": max(abs(values[name] - exact[name]) for name in exact)}
        return found if vector is None else found | {"gradient": float((vector - gradient).norm() / gradient.norm())}

    for dtype, tolerances in TOLERANCES.items():
        flex = differences(*losses_and_gradient(size, batch, "flex_attention", dtype))
        sdpa = differences(*losses_and_gradient(size, batch, "sdpa", dtype))
        kind = str(dtype).removeprefix("torch.")
        for what, distance in flex.items():
            near = distance <= max(tolerances[what], 2 * sdpa[what])
            unit = "absolute" if what == "losses" else "relative"
            yield row(f"{what} in {kind}: distance from sdpa in float32", distance, sdpa[what], unit, near=near)


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--size", choices=SIZES, default="toy")
    args = arguments(parser)
    size = SIZES[args.size]
    _, sequences = full_sequences(size, SEQUENCE_TOKENS, 2)
    (batch,) = batches_of_sequences(sequences, size, SEQUENCE_TOKENS, 2)
    for one in report(compare(size, batch), args.json):
        if not one["near"]:
            raise SystemExit(f"flex_attention: {one['name']} is {one['ours']}, sdpa's {one['baseline']}.")


if __name__ == "__main__":
    main()
