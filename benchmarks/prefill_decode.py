"""What seeing costs at inference: a merged VoRA model against its bare LLM, and against a model with an encoder.

Against the bare LLM: as many tokens, of which VoRA's are those of an image and a question; prefill of all in one
pass, then decoding. Against `LlavaForConditionalGeneration` of transformers with the same LLM and a ViT of the
teacher's size: the time from pixels to the first token's logits, at patch_merge 1 (as many image tokens as LLaVA has)
and 2 (a quarter). Reading and resizing the image is left out on all sides. All share the weights of one LLM, in the
same precision, on the same threads; ours attends as `vora.load_model` has it attend, the others by sdpa.

Ratios are ours / baseline: of tokens a second above 1 is better, of milliseconds below 1.

    python benchmarks/prefill_decode.py --json prefill_decode.json
"""

from itertools import chain

import torch
from contestants import PATCH, SIZES, default_attention, default_dtype, device, image_token_id, random_vora, with_sight
from rows import alternate, arguments, compared, parser_of, report
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from vora.model.modeling_vora import CACHE


class Prefill:
    """One pass over the whole prompt; called, it returns the outputs with the cache."""

    def __init__(self, model, **inputs):
        self.model, self.inputs = model, inputs

    @torch.inference_mode()
    def __call__(self):
        return self.model(**self.inputs, use_cache=True, logits_to_keep=1)


class Decode:
    """Greedy decoding of some tokens after a prefill, which is done before each call and not timed."""

    def __init__(self, prefill, num_tokens):
        self.prefill, self.num_tokens = prefill, num_tokens
        self.outputs = prefill()

    @torch.inference_mode()
    def __call__(self):
        model, outputs = self.prefill.model, self.outputs
        for _ in range(self.num_tokens):
            word = outputs.logits[:, -1].argmax(-1, keepdim=True) % 100 + 3  # never the image token
            outputs = model(input_ids=word, **{CACHE: getattr(outputs, CACHE)}, use_cache=True)
        getattr(self.outputs, CACHE).crop(-self.num_tokens)  # ready for the next call


def prompt_of(size, num_images, num_text_tokens, merge=1, side=None):
    """Inputs of `VoraModel` for prompts of one square image, of so many patches a side, and some text tokens."""
    side = side or size.image_size // PATCH
    num_tokens = (side // merge) ** 2
    ids = torch.randint(3, 100, (num_images, num_tokens + num_text_tokens), device=device())
    ids[:, 2 : 2 + num_tokens] = image_token_id(size)
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(num_images * side * side, 3 * PATCH**2, device=device()),
        "image_grid_thw": torch.tensor([[1, side, side]] * num_images),
    }


def bare_llm(vora):
    """The LLM of a VoRA model as anybody loads it."""
    llm = vora.to_llm()
    llm.set_attn_implementation("sdpa")
    return llm


def llava_like(llm, size):
    """LLaVA around an LLM with a random ViT of the teacher's size."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    shape = {name: size.teacher[name] for name in names} | {"patch_size": PATCH, "projection_dim": 64}
    vision = CLIPVisionConfig(**shape, image_size=size.image_size)
    small = type(llm.config)(hidden_size=llm.config.hidden_size, num_hidden_layers=0, vocab_size=8)
    config = LlavaConfig(vision_config=vision, text_config=small, image_token_index=image_token_id(size))
    with device():
        model = LlavaForConditionalGeneration._from_config(config, dtype=llm.dtype)
    model.model.language_model, model.lm_head = llm.base_model, llm.lm_head
    model.config.text_config = llm.config
    return model.eval()


def against_bare_llm(vora, size, args, side):
    """Rows of tokens a second: prefill and decoding."""
    inputs = prompt_of(size, args.batch, args.text_tokens, side=side)
    text = {"input_ids": inputs["input_ids"] % 100 + 3}
    prefills = {"ours": Prefill(vora, **inputs), "bare": Prefill(bare_llm(vora), **text)}
    decodes = {name: Decode(prefill, args.new_tokens) for name, prefill in prefills.items()}
    counts = {"prefill": inputs["input_ids"].numel(), "decode": args.batch * args.new_tokens}
    for kind, contestants in {"prefill": prefills, "decode": decodes}.items():
        what = f"{kind}, bare LLM, {args.batch} x {inputs['input_ids'].shape[1]} tokens"
        times, count = alternate(contestants, args.rounds), counts[kind]
        yield compared(what, times, "tokens/s", lambda seconds: count / seconds, baseline="bare")


def against_llava(vora, size, args):
    """Rows of milliseconds to the first token."""
    side = size.image_size // PATCH
    prompts = {merge: prompt_of(size, args.batch, args.text_tokens, merge) for merge in (1, 2)}
    pixels = torch.randn(args.batch, 3, size.image_size, size.image_size, device=device()).to(vora.dtype)
    contestants = {
        1: Prefill(vora, **prompts[1]),
        2: Prefill(with_sight(vora.to_llm(), size, default_attention(), patch_merge=2), **prompts[2]),
        "llava": Prefill(llava_like(bare_llm(vora), size), input_ids=prompts[1]["input_ids"], pixel_values=pixels),
    }
    times = alternate(contestants, args.rounds)
    for merge in (1, 2):
        counts = f"{(side // merge) ** 2} against {side * side} image tokens"
        what = f"first token, LLaVA-style, patch_merge {merge} ({counts})"
        yield compared(what, times, "ms", lambda seconds: 1000 * seconds, ours=merge, baseline="llava")


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--size", choices=SIZES, default="smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), nargs="+", default=[default_dtype()])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sides", type=int, nargs="+", help="patches on each side of the images before the bare LLM")
    parser.add_argument("--text-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    args = arguments(parser)
    size = SIZES[args.size]

    def rows():
        for dtype in args.dtype:
            vora = random_vora(size, getattr(torch, dtype), default_attention())
            bare = [against_bare_llm(vora, size, args, side) for side in args.sides or [size.image_size // PATCH]]
            for one in chain(*bare, against_llava(vora, size, args)):
                yield one | {"name": f"{one['name']}, {args.size}, {dtype}"}

    report(rows(), args.json)


if __name__ == "__main__":
    main()
