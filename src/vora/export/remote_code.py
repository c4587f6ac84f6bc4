"""Runs a saved folder with the code that it brings, in a process that never imports vora: `verify` starts this file.

python remote_code.py MODEL INPUTS OUTPUTS: of each prompt in a safetensors file log-probabilities float[T, V].
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText


@torch.inference_mode()
def run(folder: str, inputs: str, outputs: str) -> None:
    kwargs = {"trust_remote_code": True, "dtype": torch.float32}
    model = AutoModelForImageTextToText.from_pretrained(folder, **kwargs).eval()
    prompts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(inputs).items():
        number, _, key = name.partition(".")
        prompts.setdefault(number, {})[key] = tensor
    found = {number: model(**prompt, use_cache=False).logits[0].log_softmax(-1) for number, prompt in prompts.items()}
    if "vora" in sys.modules:
        raise RuntimeError(f"{folder} loaded the installed package instead of its own code.")
    save_file(found, outputs)


if __name__ == "__main__":
    run(*sys.argv[1:])
