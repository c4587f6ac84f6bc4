"""Turn trained eyes away from text, without training (`vora.adapt.spare_text`).

    python examples/spare_text.py EYES RECIPE data.folder=FOLDER teacher.name=VIT --text FOLDER/documents.jsonl \
        --text FOLDER/prose.jsonl --out SPARED

EYES: a run of stage 1, or a folder as `vora merge --eyes-out` writes it, which SPARED is too (`vora merge` makes a
model of that); RECIPE: what they were trained with, whose rows with pictures show what must stay. Minutes of one core.
"""

import argparse
import json
import random
from itertools import islice
from pathlib import Path

import torch

from vora.adapt.over_llm import save_eyes
from vora.adapt.spare_text import InputMoments, spare_text
from vora.data.packing import collate_rows
from vora.distill.keep_text import lora_off
from vora.model.stretches import by_stretch_on_cpu
from vora.train.recipe import load_recipe
from vora.train.run import open_sources, packed_rows, training_arguments
from vora.train.stages import build_learner

FED = ("input_ids", "position_ids", "seen_until", "pixel_values", "image_grid_thw")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("eyes")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("settings", nargs="*", help="key=value over the recipe's, as `vora train` takes them")
    parser.add_argument("--text", type=Path, action="append", required=True, help="JSON lines with `text`")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=30_000, help="of rows with pictures, and of text")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    starts = ["model.llm=null", "model.chat_template=null", f"model.vora={options.eyes}"]
    recipe = load_recipe(options.recipe, [*starts, *options.settings])
    if recipe.teacher:
        recipe.teacher.image_only_steps = 0
    texts = mixed([lines_of(file) for file in options.text])
    sources, arguments = open_sources(recipe.data), training_arguments(recipe, options.out)
    learner, processor = build_learner(recipe)
    learner.eval()
    by_stretch_on_cpu(learner.vora, arguments.device)
    learner.to(arguments.device)
    seen, read = InputMoments(learner.student), InputMoments(learner.student)
    with torch.inference_mode():
        see(seen, learner, iter(packed_rows(recipe, sources, processor, arguments)), recipe.data.row_tokens, options)
        with lora_off(learner):
            read_texts(read, learner, processor.tokenizer, texts, recipe.data.row_tokens, options)
    print(f"tokens with pictures: {seen.num_tokens}\ntokens of text: {read.num_tokens}")
    for name, share in spare_text(seen, read, options.strength).items():
        print(f"{name}: {share:.3g}")
    save_eyes(learner.student, processor, options.out)


def see(moments, learner, rows, row_tokens, options, at_once=8):
    """Counts what rows with pictures feed to the layers, as it is in training."""
    with_pictures = (row for row in rows if any("pixel_values" in sample for sample in row))
    while moments.num_tokens < options.tokens:
        taken = list(islice(with_pictures, at_once))
        batch = collate_rows(taken, row_tokens, 0)
        lengths = torch.tensor([sum(len(sample["input_ids"]) for sample in row) for row in taken])
        with moments.counted(torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]):
            learner.vora.model(**{k: batch[k].to(learner.vora.device) for k in FED if k in batch}, use_cache=False)


def read_texts(moments, learner, tokenizer, texts, length, options, at_once=8):
    """Counts what texts feed to the layers."""
    llm, start = learner.vora.model.language_model, 0
    tokenizer.padding_side, tokenizer.pad_token = "right", tokenizer.pad_token or tokenizer.eos_token
    while moments.num_tokens < options.tokens and start < len(texts):
        batch = tokenizer(
            texts[start : start + at_once], return_tensors="pt", padding=True, truncation=True, max_length=length
        ).to(llm.device)
        with moments.counted(batch["attention_mask"].bool()):
            llm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        start += at_once


def lines_of(file):
    """The texts of a file, in a fixed order that is not its own."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    if without := sum("text" not in row for row in rows):
        raise SystemExit(
            f"{without} of {len(rows)} lines of {file} have no `text`: give plain text, no conversations."
        )
    texts = [row["text"] for row in rows]
    random.Random(0).shuffle(texts)
    return texts


def mixed(files):
    """Texts of several files in turn, as many of each as the shortest has."""
    return [text for together in zip(*files) for text in together]


if __name__ == "__main__":
    main()
