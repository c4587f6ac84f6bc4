"""Rotary positions by row and column for image tokens, against the LLM's own by place in the text.

Both arms are the quickstart's recipe as in `distillation.py`: same LLM, pictures, questions, steps. In one, every
other rotary frequency of an image token turns by its row and the rest by its column, those of words by their place, as
in NEO and others. That is no stock LLM any more: a merged model of that arm runs nowhere but here, so it has to be
clearly better to be kept. Prints accuracy on test pictures against questions seen.

    python benchmarks/rotary_2d.py --seeds 0 1 2 --json rotary_2d.json --picture rotary_2d.png
"""

import tempfile
from pathlib import Path
from statistics import mean

import torch
from distillation import options_of, run_arm
from rows import arguments, parser_of, report, row
from torch import nn
from transformers import TrainerCallback

from vora.ablate.curves import read_curve
from vora.ablate.picture import draw_curves

ARMS = ("one axis", "two axes")
WINDOW = 0.1  # of all samples: what the curves are smoothed over


class TwoAxes(nn.Module):
    """A rotary embedding whose even frequencies turn by row and whose odd ones by column.

    Args:
        rotary: the LLM's own, for float[B, T, D] and positions int[B, T] to (cos, sin), each float[B, T, d].
    """

    def __init__(self, rotary):
        super().__init__()
        self.rotary = rotary
        self.shifts = None  # int[2, B, T], of rows and columns; set for each forward pass

    def forward(self, x, position_ids):
        if self.shifts is None:
            return self.rotary(x, position_ids)
        by_row, by_column = (self.rotary(x, position_ids + shift) for shift in self.shifts)
        size = by_row[0].shape[-1]
        is_row = torch.arange(size, device=x.device) % (size // 2) % 2 == 0  # c and c + d/2 share a frequency
        return tuple(torch.where(is_row, *pair) for pair in zip(by_row, by_column))


def shifts_of(is_image, grids):
    """From a place in the text to row and column in the image: int[2, B, T], 0 for words.

    Args:
        is_image: bool[B, T].
        grids: list of (rows, columns) in tokens of each image, in order.
    """
    shifts = torch.zeros(2, *is_image.shape, dtype=torch.long, device=is_image.device)
    found = []
    for rows, columns in grids:
        place = torch.arange(rows * columns)
        found.append(torch.stack([place // columns - place, place % columns - place]))
    if found:
        shifts[:, is_image] = torch.cat(found, 1).to(shifts)
    return shifts


def look_in_two_axes(vora):
    """Give a VoRA model's LLM two axes for image tokens."""
    model, merge = vora.model, vora.config.patch_merge
    axes = model.language_model.rotary_emb = TwoAxes(model.language_model.rotary_emb)

    def before(module, args, kwargs):
        ids, grid = kwargs["input_ids"], kwargs.get("image_grid_thw")
        grids = [] if grid is None else [(h // merge, w // merge) for t, h, w in grid.tolist() for _ in range(t)]
        axes.shifts = shifts_of(ids == vora.config.image_token_id, grids)

    model.register_forward_pre_hook(before, with_kwargs=True)


class LookInTwoAxes(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        look_in_two_axes(model.vora)


def rows_of(points):
    """Two axes beside one, at each number of steps that both arms reached: mean accuracy of the seeds."""
    for step in sorted({point["lm_steps"] for point in points}):
        of_arm = {arm: [p for p in points if p["arm"] == arm and p["lm_steps"] == step] for arm in ARMS}
        if all(of_arm.values()):
            questions = mean(p["questions_seen"] for found in of_arm.values() for p in found)
            by_seed = {arm: {p["seed"]: p["accuracy"] for p in found} for arm, found in of_arm.items()}
            yield row(
                f"rows and columns against places, some {questions:,.0f} questions, {len(of_arm[ARMS[1]])} seeds",
                mean(by_seed["two axes"].values()),
                mean(by_seed["one axis"].values()),
                "accuracy",
                by_seed=by_seed,
            )


def main():
    parser = parser_of(__doc__)
    options_of(parser)
    parser.add_argument("--picture", type=Path, help="PNG file to write: lm_loss against samples seen")
    args = arguments(parser)
    points, curves = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for arm in ARMS:
                callbacks = [LookInTwoAxes()] if arm == "two axes" else []
                points += run_arm(seed, arm, {}, args, Path(folder), callbacks)
                curves[arm, seed] = read_curve(Path(folder) / f"{arm}-{seed}" / "log.jsonl", WINDOW)
    if args.picture:
        draw_curves(curves, ARMS, ARMS[0], args.picture, "positions of image tokens")
    report(rows_of(points), args.json)


if __name__ == "__main__":
    main()
