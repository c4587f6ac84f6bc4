"""Turn trained eyes away from text, without training (`vora.adapt.spare_text`).

    python examples/spare_text.py EYES RECIPE data.folder=FOLDER teacher.name=VIT --out SPARED

EYES: a run of stage 1, or a folder as `vora merge --eyes-out` writes it, which SPARED is too (`vora merge` makes a
model of that); RECIPE: what they were trained with, whose rows with pictures show what must stay, and whose texts what
shall be left alone. Minutes of one core.
"""

import argparse
from itertools import islice
from pathlib import Path

import torch

from vora.adapt.over_llm import save_eyes
from vora.adapt.spare_text import InputMoments, spare_text
from vora.data.packing import collate_rows, label_weights
from vora.model.stretches import by_stretch_on_cpu
from vora.train.checkpoints import trained_folder
from vora.train.recipe import load_recipe
from vora.train.run import open_sources, packed_rows, training_arguments
from vora.train.stages import build_learner
from vora.train.text_energy import moments_of_text

FED = ("input_ids", "position_ids", "seen_until", "pixel_values", "image_grid_thw")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("eyes")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("settings", nargs="*", help="key=value over the recipe's, as `vora train` takes them")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=30_000, help="of rows with pictures, and of text")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"{options.out} is not empty: name a new folder, so that nothing is lost.")
    starts = ["model.llm=null", "model.chat_template=null", f"model.vora={options.eyes}"]
    recipe = load_recipe(options.recipe, [*starts, *options.settings])
    if recipe.teacher:
        recipe.teacher.image_only_steps = 0
    sources, arguments = open_sources(recipe.data), training_arguments(recipe, options.out)
    learner, processor = build_learner(recipe)
    learner.eval()
    by_stretch_on_cpu(learner.vora, arguments.device)
    learner.to(arguments.device)
    rows = packed_rows(recipe, sources, processor, arguments)
    read, seen = moments_of_text(learner, rows, options.tokens), InputMoments(learner.student)
    with torch.inference_mode():
        see(seen, learner, iter(rows), recipe, options)
    print(f"tokens with pictures: {seen.num_tokens}\ntokens of text: {read.num_tokens}")
    for name, share in spare_text(seen, read, options.strength).items():
        print(f"{name}: {share:.3g}")
    save_eyes(learner.student, processor, options.out)
    card = trained_folder(options.eyes) / "README.md"
    if card.exists():  # what comes of these eyes has their ancestry
        turned = f"Then turned away from text (`examples/spare_text.py`, strength {options.strength:g})."
        (options.out / "README.md").write_text(f"{card.read_text()}\n{turned}\n")


def see(moments, learner, rows, recipe, options, at_once=8):
    """Counts what rows with pictures feed to the layers, as it is in training: image tokens and the tokens that
    predict an answer count half of all each, though there may be sixteen of these and two of those."""
    with_pictures = until_none_in(rows, 1_000)
    while moments.num_tokens < options.tokens:
        if not (taken := list(islice(with_pictures, at_once))):
            raise SystemExit("No picture in 1,000 rows of the recipe's data: without pictures nothing must stay.")
        batch = collate_rows(taken, recipe.data.row_tokens, 0)
        with moments.counted(halves(batch, learner.config.image_token_id, recipe.data.answer_balance)):
            learner.vora.model(**{k: batch[k].to(learner.vora.device) for k in FED if k in batch}, use_cache=False)


def until_none_in(rows, many):
    """The rows with pictures, of rows without end; it ends where so many in a row have none."""
    without = 0
    while without < many:
        row = next(rows)
        without = 0 if any("pixel_values" in sample for sample in row) else without + 1
        if not without:
            yield row


def halves(batch, image_token_id, answer_balance):
    """Weights float[B, T] that sum to one: half for image tokens, half for tokens that predict an answer."""
    is_image, predicts = batch["input_ids"] == image_token_id, batch["targets"] != -100
    answers = torch.zeros(predicts.shape)
    answers[predicts] = label_weights(batch, answer_balance)
    return 0.5 * is_image / is_image.sum() + 0.5 * answers / answers.sum()


if __name__ == "__main__":
    main()
