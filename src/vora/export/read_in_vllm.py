"""Reads prompts with images in vLLM, in an environment of its own: `verify` starts this file.

python read_in_vllm.py MODEL INPUTS OUTPUTS: of each prompt in a JSON file its tokens, and its likeliest next tokens at
each place.
"""

import json
import sys
from pathlib import Path

from PIL import Image


def run(folder: str, given: str, written: str) -> None:
    import vllm

    asked = json.loads(Path(given).read_text())
    longest, num = asked["longest"], asked["num_log_probs"]
    llm = vllm.LLM(
        folder, model_impl="transformers", trust_remote_code=True, dtype="float32", enforce_eager=True,
        max_model_len=longest, max_num_batched_tokens=longest, max_num_seqs=1, max_logprobs=num,
        enable_prefix_caching=False,
    )  # fmt: skip
    prompts = [
        {"prompt_token_ids": ids, "multi_modal_data": {"image": Image.open(image).convert("RGB")}}
        for ids, image in zip(asked["prompts"], asked["images"])
    ]
    options = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=num)
    found = []
    for output in llm.generate(prompts, options):
        likeliest = [
            sorted(((one.logprob, id) for id, one in place.items()), reverse=True)[:num]
            for place in output.prompt_logprobs[1:]  # of nothing before it, the first token has none
        ]
        found.append({"num_tokens": len(output.prompt_token_ids), "likeliest": likeliest})
    Path(written).write_text(json.dumps({"version": vllm.__version__, "prompts": found}))


if __name__ == "__main__":
    run(*sys.argv[1:])
