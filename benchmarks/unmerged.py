"""What vision LoRA left unmerged costs at inference, against the same model merged.

Both are random models of one LLM, LoRA included, in one precision, as `vora.load_model` has them: unmerged they attend
by the LLM's own sdpa, so that text is the LLM's to the last bit. Prefill of an image and a question in one pass, then
decoding; the same of as much text, where LoRA is off; and a batch of both kinds, half and half. Last the bytes of the
weights.

Ratios are unmerged / merged: of tokens a second above 1 is better, of bytes below 1.

    python benchmarks/unmerged.py --rank 56 --num-blocks 30 --json unmerged.json
"""

import copy

import torch
from contestants import PATCH, SIZES, default_attention, default_dtype, random_vora
from prefill_decode import Decode, Prefill, prompt_of
from rows import alternate, arguments, compared, parser_of, report, row

from vora import attach_vision_lora, merge_vision_lora
from vora.build.lora_by_image import use_lora_by_image


@torch.no_grad()
def unmerged_and_merged(size, dtype, rank, num_blocks):
    """{name: model} of one random LoRA, which does something."""
    peft_model = attach_vision_lora(random_vora(size, dtype), rank=rank, num_blocks=num_blocks)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.01)
    merged = merge_vision_lora(copy.deepcopy(peft_model))
    merged.set_attn_implementation(default_attention())
    return {"ours": use_lora_by_image(peft_model), "original": merged}


def prompts(size, args):
    """{kind: inputs} of one batch each."""
    side = args.side or size.image_size // PATCH
    seen = prompt_of(size, args.batch, args.text_tokens, side=side)
    words = seen["input_ids"] % 100 + 3
    twice = torch.cat([seen["input_ids"], words])
    return {
        "an image and a question": seen,
        "text alone": {"input_ids": words},
        "both in one batch": seen | {"input_ids": twice, "attention_mask": torch.ones_like(twice)},
    }


def rows_of_speed(models, kind, inputs, args):
    """Rows of tokens a second: prefill and decoding."""
    batch, length = inputs["input_ids"].shape
    prefills = {name: Prefill(model, **inputs) for name, model in models.items()}
    decodes = {name: Decode(prefill, args.new_tokens) for name, prefill in prefills.items()}
    counts = {"prefill": batch * length, "decode": batch * args.new_tokens}
    for what, contestants in {"prefill": prefills, "decode": decodes}.items():
        times, count = alternate(contestants, args.rounds), counts[what]
        yield compared(f"{what}, {kind}, {batch} x {length} tokens", times, "tokens/s", lambda s: count / s)  # noqa: B023


def num_bytes(model):
    """Of the weights."""
    return sum(parameter.nbytes for parameter in model.parameters())


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--size", choices=SIZES, default="smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), nargs="+", default=[default_dtype()])
    parser.add_argument("--rank", type=int, help="of LoRA; the size's own by default")
    parser.add_argument("--num-blocks", type=int, help="with LoRA; the size's own by default")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--side", type=int, help="patches on each side of the image; the size's own by default")
    parser.add_argument("--text-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    args = arguments(parser)
    size = SIZES[args.size]
    rank, num_blocks = args.rank or size.rank, args.num_blocks or size.num_blocks

    def rows():
        for dtype in args.dtype:
            models = unmerged_and_merged(size, getattr(torch, dtype), rank, num_blocks)
            where = f"{args.size}, rank {rank} in {num_blocks} blocks, {dtype}"
            for kind, inputs in prompts(size, args).items():
                for one in rows_of_speed(models, kind, inputs, args):
                    yield one | {"name": f"{one['name']}, {where}"}
            yield row(f"weights, {where}", *map(num_bytes, models.values()), "bytes")

    report(rows(), args.json)


if __name__ == "__main__":
    main()
