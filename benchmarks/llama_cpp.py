"""Prefill and decoding of one merged model through llama.cpp against transformers, in one run on the same threads.

The prompt is an image and a question of some words, of as many tokens on both sides. llama.cpp tells its own times; of
transformers the model's passes are timed, without drawing tokens. Ratios are ours (llama.cpp) / baseline.

    python benchmarks/llama_cpp.py --threads 2 --quants f32 f16 q8_0
"""

import tempfile
from functools import partial
from operator import truediv
from pathlib import Path

import torch
from prefill_decode import Decode, Prefill
from rows import arguments, compared, parser_of, report, seconds

from vora.checkpoint.load import load_model
from vora.checkpoint.pretrained import committed_model
from vora.export.gguf_files import write_export
from vora.export.prompts import images_to_compare, in_whole_tokens, make_prompt, squared, with_image_markers
from vora.export.runtimes import as_url, llama_cpp_server


class LlamaCpp:
    """An export in llama.cpp; called, it returns the seconds of prefill and of so many steps of decoding.

    Each call has a server of its own, so that none waits beside another, and reads once before it is timed."""

    def __init__(self, export, prompt, num_steps):
        self.export, self.context = export, prompt.length + num_steps + 64
        image = {"type": "image_url", "image_url": {"url": as_url(prompt.image)}}
        content = [image, {"type": "text", "text": prompt.question}]
        self.request = {
            "messages": [{"role": "user", "content": content}], "max_tokens": num_steps + 1, "temperature": 0,
            "ignore_eos": True, "cache_prompt": False,
        }  # fmt: skip
        self.length = prompt.length

    def __call__(self):
        server = llama_cpp_server(self.export, self.context)
        server.handle_chat_completions(self.request)
        found = server.handle_chat_completions(self.request)
        if found["usage"]["prompt_tokens"] != self.length:
            raise SystemExit(f"llama.cpp reads {found['usage']['prompt_tokens']} tokens, not {self.length}.")
        return [found["timings"][name] / 1000 for name in ("prompt_ms", "predicted_ms")]


class Transformers:
    """A model in torch; called, the same."""

    def __init__(self, model, prompt, num_steps):
        inputs = dict(prompt.inputs)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        self.prefill = Prefill(model, **inputs)
        self.decode = Decode(self.prefill, num_steps)

    def __call__(self):
        return [seconds(self.prefill), seconds(self.decode)]


def measured(args):
    """The rows: prefill and decoding of each quant."""
    model, processor = load_model(args.model, dtype=torch.float32, device="cpu")
    with tempfile.TemporaryDirectory() as scratch:
        exports = []
        for quant in args.quants:
            (folder := Path(scratch, quant)).mkdir()
            exports.append(write_export(model, processor, folder, "model", quant))
        processor, size = with_image_markers(processor, exports[0].carrier.image_markers), exports[0].image_size
        (image, *_) = images_to_compare([])
        image = in_whole_tokens(processor, image) if size is None else squared(processor, image, size)
        prompt = make_prompt(processor, image, " ".join(["word"] * args.words))
        baseline, _ = load_model(args.model, dtype=getattr(torch, args.dtype), device="cpu")
        contestants = {"baseline": Transformers(baseline, prompt, args.new_tokens)}
        contestants |= {export.quant: LlamaCpp(export, prompt, args.new_tokens) for export in exports}
        found = {name: [] for name in contestants}
        for turn in range(args.rounds + 1):
            for name in list(contestants)[:: 1 if turn % 2 else -1]:
                found[name].append(contestants[name]())
        for place, (what, count) in enumerate({"prefill": prompt.length, "decode": args.new_tokens}.items()):
            times = {name: [pair[place] for pair in pairs[1:]] for name, pairs in found.items()}
            for quant in args.quants:
                name = f"{what} of {count} tokens, llama.cpp {quant} against transformers {args.dtype}"
                yield compared(name, times, "tokens/s", partial(truediv, count), quant, "baseline")


def main():
    parser = parser_of(__doc__)
    parser.add_argument("-m", "--model", default=committed_model())
    parser.add_argument("--quants", nargs="+", default=["f16", "q8_0"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of transformers")
    parser.add_argument("--words", type=int, default=64, help="of the question")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = arguments(parser)
    report(measured(args), args.json)


if __name__ == "__main__":
    main()
