"""What does patch_merge cost and save? Tokens, time, memory and accuracy of m = 1, 2, 3 side by side.

All arms see the same pictures of easy-VQA, at the same 6 x 6 patches of 16 pixels (36, 9 or 4 image tokens), in the
same order and the same steps: first pictures alone, then with all their questions. Each arm is a process of its own.

    python benchmarks/patch_merge.py --teacher WinKawaks/vit-tiny-patch16-224 --json patch_merge.json --logs logs

With `--logs` every arm's log is kept there, and their curves of lm_loss are drawn beside them.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import torch
from rows import arguments, parser_of, peak_bytes, report, row
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from vora.ablate.curves import read_curve
from vora.ablate.picture import draw_curves
from vora.adapt.lora import merge_vision_lora
from vora.data.packing import collate_rows, image_only, sample_of_record
from vora.data.sources import load_source
from vora.eval.answers import accuracy, accuracy_by_answer, exact_answers
from vora.train.pace import precision_overrides
from vora.train.recipe import load_recipe
from vora.train.run import training_arguments
from vora.train.stages import build_learner
from vora.train.trainer import VoraTrainer

SIDE = 6  # patches
MERGES = (1, 2, 3)
WINDOW = 0.1  # of all samples: what the curves are smoothed over
PICTURES_PER_STEP = {"pictures alone": 16, "with questions": 4}
UNITS = {  # of what an arm prints; all others are accuracies
    "seconds_per_1000_pictures_alone": "s",
    "seconds_per_1000_with_questions": "s",
    "peak_bytes": "bytes",
    "distill_loss": "1 - cos",
    "lm_loss": "nats",
}


class Steps(IterableDataset):
    """One item a step: so many pictures, alone in the first steps, then with all their questions."""

    def __init__(self, records, processor, num_image_only, seed):
        self.records, self.processor, self.num_image_only, self.seed = records, processor, num_image_only, seed

    def __iter__(self):
        rng, num_steps = random.Random(self.seed), 0
        pictures, numbers = [], []
        while True:
            numbers = numbers or rng.sample(range(len(self.records)), len(self.records))
            record = self.records[numbers.pop()]
            alone = num_steps < self.num_image_only
            sample = sample_of_record(record, self.processor, record.conversations)
            pictures.append(image_only(sample, self.processor.image_token_id) if alone else sample)
            if len(pictures) == PICTURES_PER_STEP["pictures alone" if alone else "with questions"]:
                yield pictures
                pictures, num_steps = [], num_steps + 1

    def collate(self, items):
        samples = [sample for item in items for sample in item]
        return collate_rows([samples], sum(len(sample["input_ids"]) for sample in samples), 0)  # no padding


class Clock(TrainerCallback):
    """Processor seconds of the two phases."""

    def __init__(self, num_image_only):
        self.num_image_only, self.marks = num_image_only, []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step in (0, self.num_image_only):
            self.marks.append(time.process_time())

    def on_train_end(self, args, state, control, **kwargs):
        self.marks.append(time.process_time())


def run_arm(merge, args):
    """One training; prints its row as JSON."""
    tokens = (SIDE // merge) ** 2
    overrides = {
        "model.llm": args.llm, "teacher.name": args.teacher, "model.patch_merge": merge, "lora.num_blocks": 12,
        "model.min_image_tokens": tokens, "model.max_image_tokens": tokens, "max_minutes": "null",
        "training.seed": args.seed, "training.max_steps": args.image_only_steps + args.lm_steps,
        "training.per_device_train_batch_size": 1, "training.logging_steps": 10, "training.save_strategy": "'no'",
        "teacher.image_only_steps": args.image_only_steps,
    } | precision_overrides()  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(
            Path(str(files("vora.quickstart"))) / "recipe.yaml", [f"{key}={value}" for key, value in overrides.items()]
        )
        torch.manual_seed(args.seed)
        learner, processor = build_learner(recipe)
        steps = Steps(load_source("easy-vqa", "train"), processor, args.image_only_steps, args.seed)
        clock = Clock(args.image_only_steps)
        trainer = VoraTrainer(
            model=learner,
            args=training_arguments(recipe, Path(folder)),
            train_dataset=steps,
            data_collator=steps.collate,
            processing_class=processor,
            learning_rates=recipe.learning_rates.model_dump(exclude_none=True),
            image_only_steps=args.image_only_steps,
            eyes_scale=recipe.teacher.eyes_scale,
            callbacks=[clock],
        )
        trainer.train()
    lines = [line for line in trainer.state.log_history if "lm_loss" in line or "distill_loss" in line]
    if args.logs:
        args.logs.mkdir(parents=True, exist_ok=True)
        log_of(args.logs, merge).write_text("".join(json.dumps(line) + "\n" for line in lines))
    peak = peak_bytes()
    records = load_source("easy-vqa", "test", max_samples=args.test_pictures)
    right = exact_answers(merge_vision_lora(learner.student), processor, records)
    first, second, end = clock.marks
    by_answer = {kind: share for kind, (share, _) in accuracy_by_answer(right, records).items()}
    print(
        json.dumps(
            {
                "patch_merge": merge,
                "image_tokens": tokens,
                "seconds_per_1000_pictures_alone": 1000 * (second - first) / args.image_only_steps / 16,
                "seconds_per_1000_with_questions": 1000 * (end - second) / args.lm_steps / 4,
                "peak_bytes": peak,
                "distill_loss": lines[-1]["distill_loss"],
                "lm_loss": sum(line["lm_loss"] for line in lines[-3:]) / 3,
                "accuracy": accuracy(right),
                **by_answer,
            }
        )
    )


def log_of(folder, merge):
    """Where an arm's log is kept."""
    return folder / f"merge-{merge}.jsonl"


def draw(folder):
    """The curves of all arms, folder/patch_merge.png."""
    curves = {(f"m = {merge}", 0): read_curve(log_of(folder, merge), WINDOW) for merge in MERGES}
    names = [name for name, _ in curves]
    draw_curves(curves, names, names[0], folder / "patch_merge.png", "m x m patches to an image token")


def rows_of(one, plain):
    """Of what an arm printed, each figure beside that of m = 1."""
    for name, value in one.items():
        if name not in ("patch_merge", "image_tokens"):
            what = f"patch_merge {one['patch_merge']} against 1, {name}"
            yield row(what, value, plain[name], UNITS.get(name, "accuracy"), image_tokens=one["image_tokens"])


def compared():
    """Rows as the arms finish."""
    plain = figures_of(1)
    for merge in MERGES[1:]:
        yield from rows_of(figures_of(merge), plain)


def figures_of(merge):
    """What an arm prints, in a process of its own."""
    done = subprocess.run([sys.executable, *sys.argv, "--arm", str(merge)], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--teacher", default="WinKawaks/vit-tiny-patch16-224", help="a ViT with patches of 16 pixels")
    parser.add_argument("--llm", default="smollm2-135m")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-only-steps", type=int, default=320, help="of 16 pictures")
    parser.add_argument("--lm-steps", type=int, default=400, help="of 4 pictures with some 38 questions")
    parser.add_argument("--test-pictures", type=int, default=300)
    parser.add_argument("--logs", type=Path, help="folder for the arms' logs and curves")
    parser.add_argument("--arm", type=int, choices=MERGES, help="one arm, in this process")
    args = arguments(parser)
    if args.arm:
        run_arm(args.arm, args)
        return
    report(compared(), args.json)
    if args.logs:
        draw(args.logs)


if __name__ == "__main__":
    main()
