"""Does block-wise distillation earn its place? Accuracy against samples seen, with and without it.

Both arms are the quickstart's recipe: same LLM, pictures, questions in the same order, LoRA, learning rate, and the
same start of the patch embedding from the teacher's, same schedule over as many steps with questions. One distills
(its first steps see pictures alone and are not counted as questions), the other does not. Prints accuracy on test
pictures against questions seen.

    python benchmarks/distillation.py --seeds 0 1 2 --json distillation.json
"""

import json
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from statistics import mean

from rich.console import Console
from rows import arguments, parser_of, report, row
from transformers import TrainerCallback

from vora.data.sources import load_source
from vora.eval.answers import accuracy, exact_answers
from vora.train.pace import precision_overrides
from vora.train.recipe import load_recipe
from vora.train.run import train

ARMS = {"with": {}, "without": {"teacher.weight": 0, "teacher.image_only_steps": 0}}


class Checkpoints(TrainerCallback):
    """Accuracy on test pictures every few steps that predict something."""

    def __init__(self, records, every, first):
        self.records, self.every, self.first, self.points = records, every, first, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        steps = state.global_step - self.first
        if steps > 0 and steps % self.every == 0:
            right = exact_answers(model.vora, kwargs["processing_class"], self.records)
            self.points.append({"lm_steps": steps, "accuracy": accuracy(right)})
            model.train()


def run_arm(seed, arm, overrides, args, folder, callbacks=()):
    """One training; returns its points."""
    overrides = overrides | {"training.seed": seed, "model.llm": args.llm, "max_minutes": "null"}
    overrides |= {"training.logging_steps": args.every} | precision_overrides()
    recipe = load_recipe(
        Path(str(files("vora.quickstart"))) / "recipe.yaml", [f"{key}={value}" for key, value in overrides.items()]
    )
    first = recipe.teacher.image_only_steps
    if first and args.eyes_steps is not None:
        first = args.eyes_steps
    first -= first % args.every  # so that log lines and checkpoints fall together
    recipe.teacher.image_only_steps, recipe.training["max_steps"] = first, first + args.lm_steps
    checkpoints = Checkpoints(load_source("easy-vqa", "test", max_samples=args.test_pictures), args.every, first)
    start = time.monotonic()
    train(recipe, folder / f"{arm}-{seed}", console=Console(quiet=True), callbacks=[checkpoints, *callbacks])
    lines = [json.loads(line) for line in (folder / f"{arm}-{seed}" / "log.jsonl").read_text().splitlines()]
    predicting = [line for line in lines if "lm_loss" in line]
    before = max((line["samples_seen"] for line in lines if "lm_loss" not in line), default=0)
    for point, line in zip(checkpoints.points, predicting):
        point |= {"questions_seen": line["samples_seen"] - before, "lm_loss": line["lm_loss"]}
        point |= {"arm": arm, "seed": seed, "seconds": time.monotonic() - start}
        print(json.dumps(point), flush=True)
    return checkpoints.points


def options_of(parser):
    """What both trainings of an arm are given."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--llm", default="smollm2-135m")
    parser.add_argument("--eyes-steps", type=int, help="steps with pictures alone; the quickstart's by default")
    parser.add_argument("--lm-steps", type=int, default=120, help="steps with questions, some 37 questions each")
    parser.add_argument("--every", type=int, default=40, help="steps between measurements")
    parser.add_argument("--test-pictures", type=int, default=100)


def rows_of(points):
    """With distillation beside without, at each number of steps that both arms reached: mean accuracy of the seeds."""
    for step in sorted({point["lm_steps"] for point in points}):
        of_arm = {arm: [p for p in points if p["arm"] == arm and p["lm_steps"] == step] for arm in ARMS}
        accuracies = {arm: {p["seed"]: p["accuracy"] for p in found} for arm, found in of_arm.items()}
        if all(of_arm.values()):
            questions = mean(p["questions_seen"] for found in of_arm.values() for p in found)
            yield row(
                f"distillation against none, some {questions:,.0f} questions seen, {len(of_arm['with'])} seeds",
                *(mean(accuracies[arm].values()) for arm in ARMS),
                "accuracy",
                by_seed=accuracies,
                points=of_arm,
            )


def main():
    parser = parser_of(__doc__)
    options_of(parser)
    args = arguments(parser)
    points = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for arm in ARMS:
                points += run_arm(seed, arm, ARMS[arm], args, Path(folder))
    report(rows_of(points), args.json)


if __name__ == "__main__":
    main()
