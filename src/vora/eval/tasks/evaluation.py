"""A task as an evaluation: examples are asked, answers scored."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vora.data.answers import tasks_of
from vora.eval.evaluation import Evaluation, Job, computed_as
from vora.eval.prediction_cache import Line, PredictionCache, fingerprints, model_fingerprint
from vora.eval.report import Report
from vora.eval.rows import Data, Example, Rows, SkippedRows
from vora.eval.scoring.generate import without_thinking
from vora.eval.scoring.predict import predict
from vora.eval.tasks.captions import Captions
from vora.eval.tasks.classify import Classify
from vora.eval.tasks.statements import Statements
from vora.eval.tasks.task import Task
from vora.eval.tasks.vqa import Vqa

TASKS: dict[str, type[Task]] = {task.name: task for task in (Captions, Vqa, Classify, Statements)}


@dataclass
class TaskEvaluation(Evaluation):
    """All examples of a task are asked, answers scored, scores summed up."""

    task: Task

    @property
    def name(self) -> str:
        return self.task.name

    def check_data(self, data: Data) -> None:
        check_has_example(self.task, data)

    def run(self, job: Job) -> Report:
        task, rows = self.task, Rows(job.data)
        examples = examples_of(task, rows, job.skipped)
        conditions = conditions_of(task, examples, job, rows.files)
        cache = job.open_cache(conditions, len(examples))
        with job.progress(task.name, len(examples), len(cache.done)) as advance:
            predict(job.model, job.processor, task, examples, cache, advance)
        kept, lines = _answered(examples, cache, job.skipped)
        if task.by_image:  # a set may have a row for each question about one image
            kept = [replace(example, group=line.get("image", example.group)) for example, line in zip(kept, lines)]
        scores = scores_of(task, kept, lines)
        metrics = task.metrics(kept, scores)
        cache.rewrite([line | {"scores": score} for line, score in zip(lines, scores)]
                      + [line for line in cache.done.values() if "bad" in line])  # fmt: skip
        return job.report(len(kept), metrics, conditions, cache, rows.files)


def task_of(rows: Rows) -> str:
    """The name of the task that data is for, by the columns of its first readable row; ValueError if it is for
    several, or for none."""
    for row in rows.read(SkippedRows()):
        found = tasks_of(row.values)
        if len(found) == 1:
            return found[0]
        what = f"may be of {' or '.join(found)}" if found else "fit no task"
        raise ValueError(f"The columns {', '.join(sorted(row.values))} {what}: say which with --of.")
    raise ValueError(f"No row of {rows.data} can be read.")


def check_has_example(task: Task, data: Data) -> None:
    """Raise ValueError where data cannot be opened, or holds no example of a task."""
    skipped = SkippedRows()
    if next(iter(task.each(Rows(data), skipped)), None) is None:
        raise ValueError(f"{data} holds no example of the task {task.name}.{skipped.first()}")


def examples_of(task: Task, rows: Rows, skipped: SkippedRows) -> list[Example]:
    """A task's examples; raises ValueError if there is none."""
    examples = task.examples(rows, skipped)
    if not examples:
        raise ValueError(f"{rows.data} holds no example of the task {task.name}.{skipped.first()}")
    return examples


def conditions_of(task: Task, examples: Sequence[Example], job: Job, files: Sequence[str | Path]) -> dict[str, Any]:
    """All that predictions depend on, for the `PredictionCache` and the report."""
    image_processor = job.processor.image_processor
    candidates = list(dict.fromkeys(example.candidates for example in examples))
    return {
        "task": task.name,
        "model": model_fingerprint(job.model_name),
        "data": fingerprints(files),
        "settings": {
            "prompt": task.prompt,
            "max_new_tokens": task.max_new_tokens,
            "num_beams": task.num_beams,
            "candidates": {"most": max(map(len, candidates)), "hash": _hash(candidates)},
            "requests": _hash([(example.prompt, example.references) for example in examples]),
            "max_samples": task.max_samples,
            "seed": task.seed,
            **computed_as(job.model),
            "min_image_tokens": image_processor.min_image_tokens,
            "max_image_tokens": image_processor.max_image_tokens,
            **job.data.options,
        },
        "num_examples": len(examples),
    }


def scores_of(task: Task, examples: Sequence[Example], lines: Sequence[Line]) -> list[dict[str, Any]]:
    """A task's scores of predictions; what a model thought aloud is no part of its answer."""
    answers = [
        line | {"generated": without_thinking(line["generated"])} if "generated" in line else line for line in lines
    ]
    return task.score(examples, answers)


def _answered(
    examples: Sequence[Example], cache: PredictionCache, skipped: SkippedRows
) -> tuple[list[Example], list[Line]]:
    """The examples that could be asked, and their lines; the others are added to `skipped`. ValueError if there is
    none."""
    for line in (line for _, line in sorted(cache.done.items()) if "bad" in line):
        skipped.add(line["name"], line["bad"])
    pairs = [(example, cache.done[index]) for index, example in enumerate(examples) if "bad" not in cache.done[index]]
    if not pairs:
        raise ValueError(f"None of {len(examples)} examples could be asked.{skipped.first()}")
    return [example for example, _ in pairs], [line for _, line in pairs]


def _hash(values: object) -> str:
    return hashlib.sha256(repr(values).encode("utf-8", "backslashreplace")).hexdigest()[:16]
