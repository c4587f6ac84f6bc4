"""Does a model look at the image? How much likelier the right image (see `vora.eval.probe.conditions`) makes what is
right (a caption, an answer, a class, true or false), and what the task's own score loses without it."""

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vora.eval.evaluation import Evaluation, Job
from vora.eval.prediction_cache import Line, PredictionCache
from vora.eval.probe.conditions import CONDITIONS, Substitutes, image_groups_of, num_alike, other_groups
from vora.eval.probe.figure import draw_probe
from vora.eval.probe.requests import ImageCondition, examples_under, image_conditions, record_of
from vora.eval.probe.scores import ProbeScores, drawn_together, probe_metrics
from vora.eval.probe.verdict import verdict_of
from vora.eval.report import Report, beside
from vora.eval.rows import Data, Example, Rows
from vora.eval.scoring.predict import predict
from vora.eval.scoring.teacher_forced import score_answers
from vora.eval.tasks.evaluation import check_has_example, conditions_of, examples_of, scores_of
from vora.eval.tasks.task import Task

SPOKEN = {"captions": ["cider_d"], "vqa": ["exact_accuracy", "vqa_accuracy"], "classify": ["generated_accuracy"]}


@dataclass
class Probe(Evaluation):
    """Probe whether a model looks. Its report has a `verdict` in words, and `looks`: true, false or, unclear, null."""

    task: Task
    generate: bool = False  # also let the model speak freely, and score that as the task does; slow
    against: Sequence[str] = CONDITIONS[1:]  # some of these, `other` among them
    name = "probe"

    def __post_init__(self) -> None:
        wrong = [condition for condition in self.against if condition not in CONDITIONS[1:]]
        if wrong or "other" not in self.against:
            cause = f"there is no {', '.join(wrong)}" if wrong else "other is needed for the verdict"
            raise ValueError(f"--against {','.join(self.against)}: {cause}; choose among {', '.join(CONDITIONS[1:])}.")
        self.task.generates = self.task.generates and self.generate

    def check_data(self, data: Data) -> None:
        check_has_example(self.task, data)

    def run(self, job: Job) -> Report:
        task, rows = self.task, Rows(job.data)
        shown = [condition for condition in CONDITIONS if condition == "right" or condition in self.against]
        found = examples_of(task, rows, job.skipped)
        conditions = conditions_of(task, found, job, rows.files)
        examples, groups = image_groups_of(found, job.skipped)
        seen = hashlib.sha256(" ".join(group.key for group in groups).encode()).hexdigest()[:16]  # of those that open
        conditions |= {"task": "probe", "of": task.name, "generate": self.generate, "shown": shown, "images": seen}
        others = other_groups(groups, task.seed)
        substitutes = Substitutes(groups, others, job.processor.image_processor, task.seed)
        under = examples_under(shown, examples, substitutes)
        if task.chooses:
            cache = job.open_cache(conditions, len(under))
            scores = _choose(task, examples, _answer_all(job, task, shown, under, cache))
        else:
            answers = [
                one.references if task.name == "captions" else [most_common(one.references)] for one in examples
            ]
            reads = image_conditions(shown, answers, substitutes)
            cache = job.open_cache(conditions, len(reads))
            read_requests(job, reads, examples, answers, cache)
            scores = _scores_of_lines(answers, shown, cache.done.values())
            if task.name == "captions":
                scores.task_scores = {}  # to say one of a person's captions word by word is no score
            if task.generates:
                spoken = job.open_cache(conditions, len(under), ".generated.jsonl")
                lines = _answer_all(job, task, shown, under, spoken)
                scores.task_scores |= _task_scores(task, examples, lines)
                cache.count_in(spoken)
        scores.groups = drawn_together(examples, groups)
        metrics = probe_metrics(scores, task.seed)
        num_groups = len(set(scores.groups))
        looks, verdict = verdict_of(metrics, list(scores.task_scores), num_groups, len(scores.examples))
        image = beside(job.out, ".png")
        draw_probe(image, metrics, scores, verdict, f"{task.name}, {Path(job.model_name).name}")
        return job.report(
            len(examples), metrics, conditions, cache, rows.files,
            of=task.name, num_images=len(groups), num_references=len(scores.examples),
            num_alike=num_alike(groups, others), looks=looks, verdict=verdict, image=image.name,
        )  # fmt: skip


def most_common(references: Sequence[str]) -> str:
    """The first of those that are given most often."""
    return max(references, key=references.count)


def read_requests(
    job: Job,
    reads: Sequence[ImageCondition],
    examples: Sequence[Example],
    answers: Sequence[Sequence[str]],
    cache: PredictionCache,
) -> None:
    """Read all answers that a cache has no line of; a line has the `requests` of an image, and of each `log_probs`,
    `num_tokens` and whether a greedy model would say it, `right`."""
    total = sum(len(shown.requests) for shown in reads)
    done = sum(len(reads[index].requests) for index in cache.done)
    left = [index for index in range(len(reads)) if index not in cache.done]
    records = ((index, record_of(reads[index], examples, answers)) for index in left)
    began = time.monotonic()
    with job.progress("answers read", total, done) as advance:
        for batch in score_answers(job.model, job.processor, records):
            seconds = (time.monotonic() - began) / len(batch)
            lines: list[Line] = []
            for index, score in batch.items():
                shown, log_probs = reads[index], score.log_probs.round(5).tolist()
                line = {"index": index, "name": shown.name, "requests": shown.requests, "log_probs": log_probs}
                answered = {"num_tokens": score.num_tokens.tolist(), "right": score.right}
                lines.append(line | answered | {"seconds": round(seconds, 4)})
                advance(len(score.right))
            cache.add(lines)
            began = time.monotonic()


def _scores_of_lines(answers: Sequence[Sequence[str]], shown: Sequence[str], lines: Iterable[Line]) -> ProbeScores:
    """Scores of references that are read, not chosen among; the task's is whether a greedy model says them."""
    pairs = [(example, reference) for example, texts in enumerate(answers) for reference in range(len(texts))]
    place = {pair: number for number, pair in enumerate(pairs)}
    log_probs = {condition: np.full(len(pairs), np.nan) for condition in shown}
    right = {condition: np.zeros(len(pairs)) for condition in shown}
    num_tokens = np.zeros(len(pairs), int)
    for line in lines:
        found = zip(line["requests"], line["log_probs"], line["num_tokens"], line["right"])
        for (example, reference, condition), log_prob, count, is_right in found:
            at = place[example, reference]
            log_probs[condition][at], num_tokens[at], right[condition][at] = log_prob, count, is_right
    return ProbeScores(np.array([example for example, _ in pairs]), log_probs, num_tokens, {"accuracy": right})


def _choose(task: Task, examples: Sequence[Example], lines: dict[str, list[Line]]) -> ProbeScores:
    """Scores of a task whose answers are chosen by likelihood."""
    log_probs = {name: np.array([line["reference_log_prob"] for line in found]) for name, found in lines.items()}
    num_tokens = np.array([line["reference_tokens"] for line in lines["right"]])
    wanted = [example.references[0] for example in examples]
    right = {
        name: np.array([float(line["chosen"] == answer) for line, answer in zip(found, wanted)])
        for name, found in lines.items()
    }
    scores = {"accuracy": right} | (_task_scores(task, examples, lines) if task.generates else {})
    return ProbeScores(np.arange(len(examples)), log_probs, num_tokens, scores)


def _answer_all(
    job: Job, task: Task, shown: Sequence[str], under: Sequence[Example], cache: PredictionCache
) -> dict[str, list[Line]]:
    """{condition: lines of its examples} of all that is asked; ValueError where one cannot be."""
    with job.progress(task.name, len(under), len(cache.done)) as advance:
        predict(job.model, job.processor, task, under, cache, advance)
    lines = [cache.done[index] for index in range(len(under))]
    for line in lines:
        if "bad" in line:
            raise ValueError(f"{line['name']}: {line['bad']}")
    count = len(under) // len(shown)
    return {condition: lines[place * count : (place + 1) * count] for place, condition in enumerate(shown)}


def _task_scores(
    task: Task, examples: Sequence[Example], lines: dict[str, list[Line]]
) -> dict[str, dict[str, np.ndarray]]:
    """The task's own scores of what a model says freely: {name: {condition: float[E]}}."""
    of_each = {condition: scores_of(task, examples, found) for condition, found in lines.items()}
    return {
        name: {condition: np.array([one[name] for one in scores]) for condition, scores in of_each.items()}
        for name in SPOKEN[task.name]
    }
