"""The attention mask of one sequence: ours against the original's dense float mask, made token by token.

It holds images of a size with some text tokens after each. Ours also keeps packed samples apart, which the original
cannot, and is made as `vora train` makes it: on a processor cut into segments.

    python benchmarks/mask.py --json mask.json
"""

import math

import torch
from contestants import default_attention, device
from original import dense_mask
from rows import alternate, arguments, medians, parser_of, report, row, spread
from transformers import LlamaConfig

from vora.model.attention import attention_masks, image_blocks

NUM_TEXT_TOKENS = 32  # after each image


def mixed_sequence(num_tokens, side):
    """(bool[1, T] at image tokens, int[N, 3] grids, int[1, T] seen_until) of images with text, cut at T tokens."""
    num_patches = side * side
    is_image = torch.arange(num_tokens) % (num_patches + NUM_TEXT_TOKENS) < num_patches
    whole = num_tokens // (num_patches + NUM_TEXT_TOKENS) * (num_patches + NUM_TEXT_TOKENS)
    is_image[whole:] = False  # the rest is text
    grids = torch.tensor([[1, side, side]] * (int(is_image.sum()) // num_patches))
    places = torch.arange(num_tokens)
    ends = (places // (num_patches + NUM_TEXT_TOKENS) + 1) * (num_patches + NUM_TEXT_TOKENS) - 1
    return is_image[None].to(device()), grids, ends.clamp(max=num_tokens - 1)[None].to(device())


def compare_masks(num_tokens, side, rounds):
    config = LlamaConfig(hidden_size=64, num_attention_heads=4)
    config._attn_implementation = default_attention()
    side = min(side, math.isqrt(num_tokens - NUM_TEXT_TOKENS))
    is_image, grids, seen_until = mixed_sequence(num_tokens, side)
    valid, embeds = torch.ones_like(is_image), torch.zeros(1, num_tokens, 64, device=device())

    def ours():
        blocks = image_blocks(is_image, grids)
        return attention_masks(config, embeds, None, None, None, blocks, seen_until)

    def original():
        return dense_mask(valid, is_image, torch.float32)

    if not torch.equal(
        attention_masks(config, embeds, None, None, None, image_blocks(is_image, grids)), original() == 0
    ):
        raise SystemExit("The masks of one unpacked row differ.")
    times = alternate({"ours": ours, "original": original}, rounds)
    found = medians(times)
    noise = {name: spread(values) for name, values in times.items()}
    name = f"mask of {num_tokens} tokens, {len(grids)} images of {side * side}"
    return row(name, 1000 * found["ours"], 1000 * found["original"], "ms", noise=noise)


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048, 4096])
    parser.add_argument(
        "--side", type=int, default=14, help="patches along a side of each image, fewer where none would fit"
    )
    parser.add_argument("--rounds", type=int, default=9)
    args = arguments(parser)
    report([compare_masks(num_tokens, args.side, args.rounds) for num_tokens in args.tokens], args.json)


if __name__ == "__main__":
    main()
