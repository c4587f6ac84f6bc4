"""The mean of two trainings of the same eyes, often about as good as the better of them at each task (model soups,
arXiv 2203.05482; docs/LOG.md has cases).

    python examples/average_eyes.py src/vora/pretrained EYES --out BOTH

Both folders are as `vora merge --eyes-out` writes them, the second trained on from the first: LoRA's A and B are
averaged one by one, which means something only between neighbours. The card is the second's, and says so.
"""

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"


def what_they_are_of(folder):
    """The LLM's digest, and the rank and scale of LoRA."""
    model, adapter = (json.loads((folder / f"{name}config.json").read_text()) for name in ("", "adapter_"))
    return model.get("llm_digest"), adapter["r"], adapter["lora_alpha"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("eyes", nargs=2, type=Path, help="folders of eyes over the same LLM")
    parser.add_argument("--out", type=Path, required=True, help="a new folder; all but the weights is the second's")
    options = parser.parse_args()
    first, second = (load_file(folder / WEIGHTS) for folder in options.eyes)
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (first, second)]
    if shapes[0] != shapes[1] or what_they_are_of(options.eyes[0]) != what_they_are_of(options.eyes[1]):
        parser.error(f"{options.eyes[0]} and {options.eyes[1]} are of other LLMs or LoRA: not of one training.")
    shutil.copytree(options.eyes[1], options.out)
    with open(options.out / "README.md", "a") as card:
        card.write(
            f"\nThe weights are the mean of these and of `{options.eyes[0].name}` (`examples/average_eyes.py`).\n"
        )
    mean = {name: ((first[name].float() + second[name].float()) / 2).to(first[name].dtype) for name in first}
    save_file(mean, options.out / WEIGHTS)


if __name__ == "__main__":
    main()
