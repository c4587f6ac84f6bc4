"""Does a model look at the image? What it makes of each example with the right image and with others instead.

Two measures, for any task: how much likelier the right image makes what is right (a caption, an answer, a class,
true or false), and what the task's own score loses without it. See `vora.eval.probe.conditions` for what is shown.

Dims: E examples, R references (each caption of an image is one; of other tasks each example has one).
"""

import hashlib
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from vora.data.schema import Sample
from vora.data.turns import question_and_answer
from vora.eval.metrics.intervals import interval_of, mean, share
from vora.eval.probe.conditions import CONDITIONS, image_groups_of, images_under, num_alike, other_groups
from vora.eval.probe.figure import draw_probe
from vora.eval.probe.verdict import verdict_of
from vora.eval.rows import Rows, SkippedRows
from vora.eval.run import conditions_of, examples_of, open_cache, progress, write_report
from vora.eval.scoring.predict import predict
from vora.eval.scoring.teacher_forced import score_answers

MOST_ASKED = 64  # of one showing of an image
TIE = 1e-4  # nats; what a batch's padding may change


@dataclass
class ProbeScores:
    """What a model makes of references under each condition.

    Args:
        examples: int[R], the example that a reference belongs to.
        log_probs: {condition: float[R]}.
        num_tokens: int[R].
        scores: {name of a score: {condition: float[E]}}.
        groups: list of E names; examples of one group are drawn together.
    """

    examples: np.ndarray
    log_probs: dict
    num_tokens: np.ndarray
    scores: dict
    groups: list


@dataclass
class ImageCondition:
    """One image as it is shown, and all that is asked about it: (example, reference, condition)."""

    name: str
    images: object
    asked: list = field(default_factory=list)


class Showings:
    """Showings as a sequence of `Sample`s, each made when it is asked for.

    Args:
        answers: for each example the list of its references.
    """

    def __init__(self, showings, examples, answers):
        self.showings, self.examples, self.answers = showings, examples, answers

    def __len__(self):
        return len(self.showings)

    def __getitem__(self, index):
        showing = self.showings[index]
        conversations = [
            question_and_answer(self.examples[example].prompt, self.answers[example][reference])
            for example, reference, _ in showing.asked
        ]
        row = self.examples[showing.asked[0][0]].name
        return Sample(f"{row} and what else is asked of its image", showing.images(), conversations)


def probe(
    model,
    processor,
    task,
    paths,
    out,
    console,
    *,
    model_name,
    rows_options=None,
    generate=False,
    against=CONDITIONS[1:],
):
    """Probe whether a model looks, write a report and beside it an image.

    Args:
        task: the `Task` that the data is for.
        paths, out, model_name, rows_options: as for `evaluate`.
        generate: also let it speak freely, and score that as the task does; slow.
        against: what the right image is held against: some of `CONDITIONS`, `other` among them.

    Returns:
        What the report holds: besides metrics a `verdict` in words, and `looks`: true, false or, unclear, null.

    Raises:
        ValueError: `against` is wrong, the data holds no example of the task or but one image, or the predictions
            found are not of this model, data and task.
    """
    start, out, bad = time.monotonic(), Path(out), SkippedRows()
    if "other" not in against or (wrong := set(against) - set(CONDITIONS[1:])):
        cause = "other is needed for the verdict" if "other" not in against else f"there is no {', '.join(wrong)}"
        raise ValueError(f"Held against {', '.join(against)}: {cause}; choose among {', '.join(CONDITIONS[1:])}.")
    shown = [condition for condition in CONDITIONS if condition == "right" or condition in against]
    task.generates = task.generates and generate
    rows = Rows(paths, **(rows_options or {}))
    found = examples_of(task, rows, bad)
    conditions = conditions_of(task, found, model, processor, model_name, rows, rows_options or {})
    examples, scenes = image_groups_of(found, bad)
    seen = hashlib.sha256(" ".join(scene.key for scene in scenes).encode()).hexdigest()[:16]  # of those that open
    conditions |= {"task": "probe", "of": task.name, "generate": generate, "shown": shown, "images": seen}
    others = other_groups(scenes, task.seed)

    count = len(examples) * len(shown)
    file = out.with_suffix(".predictions.jsonl")
    if task.chooses:
        cache = open_cache(file, conditions, count, model, console)
        under = _under_conditions(shown, examples, scenes, others, processor, task.seed)
        readings = _choose(model, processor, task, examples, shown, under, cache, console)
    else:
        answers = [
            example.references if task.name == "captions" else [max(example.references, key=example.references.count)]
            for example in examples
        ]
        showings = _showings(shown, answers, scenes, others, processor.image_processor, task.seed)
        cache = open_cache(file, conditions, len(showings), model, console)
        readings = _read(model, processor, Showings(showings, examples, answers), shown, cache, console)
        if task.name == "captions":
            readings.scores = {}  # to say one of a person's captions word by word is no score
        if task.generates:
            spoken = open_cache(out.with_suffix(".generated.jsonl"), conditions, count, model, console)
            under = _under_conditions(shown, examples, scenes, others, processor, task.seed)
            readings.scores |= _speak(model, processor, task, examples, shown, under, spoken, console)
            cache.count_in(spoken)
    readings.groups = _drawn_together(examples, scenes)
    metrics = probe_metrics(readings, task.seed)
    looks, verdict = verdict_of(metrics, list(readings.scores), len(set(readings.groups)), len(readings.examples))
    image = out.with_suffix(".png")
    draw_probe(image, metrics, readings, verdict, f"{task.name}, {Path(str(model_name)).name}")
    facts = {
        "of": task.name,
        "num_examples": len(examples),
        "num_images": len(scenes),
        "num_references": len(readings.examples),
        "num_alike": num_alike(scenes, others),
        "looks": looks,
        "verdict": verdict,
        "metrics": metrics,
        "image": image.name,
    }
    return write_report(out, facts, conditions, model, model_name, rows.files, bad, cache, start)


def probe_metrics(readings, seed=0):
    """{name: {"value", "interval"}} of `ProbeScores`; intervals are of draws of whole groups.

    `log_likelihood_with_C` nats per reference under condition C; `gain_over_C` how many more the right image brings,
    and `gain_over_C_per_token`; `right_beats_C` the share of references that it makes likelier, ties counting half;
    and of each score its value `with_C` and its paired `drop` from the right image to C.
    """
    shown = list(readings.log_probs)
    found, of_references = {}, [readings.groups[example] for example in readings.examples]
    for condition in shown:
        found[f"log_likelihood_with_{condition}"] = mean(readings.log_probs[condition], of_references, seed)
    for condition in shown[1:]:
        gains = readings.log_probs["right"] - readings.log_probs[condition]
        sums = np.stack([gains, readings.num_tokens], 1)
        found[f"gain_over_{condition}"] = mean(gains, of_references, seed)
        found[f"gain_over_{condition}_per_token"] = interval_of(_ratio, sums, of_references, seed)
        wins = np.where(np.abs(gains) < TIE, 0.5, gains > 0)
        value_of = mean if (wins == 0.5).all() else share  # ties are no coins: who is blind ties every time
        found[f"right_beats_{condition}"] = value_of(wins, of_references, seed)
    for name, scores in readings.scores.items():
        for condition in shown:
            is_share = np.isin(scores[condition], (0.0, 1.0)).all()
            found[f"{name}_with_{condition}"] = (share if is_share else mean)(scores[condition], readings.groups, seed)
        for condition in shown[1:]:
            drop = np.asarray(scores["right"]) - np.asarray(scores[condition])
            found[f"{name}_drop_{condition}"] = mean(drop, readings.groups, seed)
    return found


def _ratio(sums):
    return sums[..., 0] / sums[..., 1]


def _drawn_together(examples, scenes):
    """A number for each example; those of one image have the same, and those of one group of their task."""
    above = {}

    def top(name):
        while above.setdefault(name, name) != name:
            name = above[name]
        return name

    for number, scene in enumerate(scenes):
        for example in scene.examples:
            above[top(("group", str(examples[example].group)))] = top(("image", number))
    numbers = {}
    return [numbers.setdefault(top(("group", str(example.group))), len(numbers)) for example in examples]


def _showings(shown, answers, scenes, others, image_processor, seed):
    """All that is to be read. An image stands once for what is asked of it rightly and, as another one, wrongly."""
    own = [
        [(example, reference) for example in scene.examples for reference in range(len(answers[example]))]
        for scene in scenes
    ]
    shown_for = {other: number for number, other in enumerate(others)}
    found, alone = [], []
    for number, scene in enumerate(scenes):
        right = [(*pair, "right") for pair in own[number]] + [(*pair, "other") for pair in own[shown_for[number]]]
        forms = {form: [(*pair, form) for pair in own[number]] for form in shown}
        forms |= {"right": right, "none": []}
        del forms["other"]
        for form, asked in forms.items():
            opens = images_under(form, scene, scene, image_processor, seed)
            found += _cut(ImageCondition(f"{scene.key}, {form}", opens, asked))
        alone += [(*pair, "none") for pair in own[number] if "none" in shown]
    return found + _cut(ImageCondition("no image", list, alone))


def _cut(showing):
    """A showing in parts of at most `MOST_ASKED`."""
    starts = range(0, len(showing.asked), MOST_ASKED)
    return [replace(showing, asked=showing.asked[start : start + MOST_ASKED]) for start in starts]


def _read(model, processor, records, shown, cache, console):
    """`ProbeScores` of references that are read, not chosen among; the score is whether a greedy model says them."""
    total = sum(len(showing.asked) for showing in records.showings)
    done = sum(len(records.showings[index].asked) for index in cache.done)
    began = time.monotonic()
    with progress(console, "answers read", total, done) as advance:
        for batch in score_answers(model, processor, records, cache.done):
            seconds = (time.monotonic() - began) / len(batch)
            lines = []
            for index, told in batch.items():
                line = {"index": index, "name": records.showings[index].name, "asked": records.showings[index].asked}
                line |= {"log_probs": told.log_probs.round(5).tolist(), "num_tokens": told.num_tokens.tolist()}
                lines.append(line | {"right": told.right, "seconds": round(seconds, 4)})
                advance(len(told.right))
            cache.add(lines)
            began = time.monotonic()
    place = {}
    for example, texts in enumerate(records.answers):
        for reference in range(len(texts)):
            place[example, reference] = len(place)
    log_probs = {condition: np.full(len(place), np.nan) for condition in shown}
    right = {condition: np.zeros(len(place)) for condition in shown}
    num_tokens = np.zeros(len(place), int)
    for line in cache.done.values():
        told = zip(line["asked"], line["log_probs"], line["num_tokens"], line["right"])
        for (example, reference, condition), log_prob, count, is_right in told:
            at = place[example, reference]
            log_probs[condition][at], num_tokens[at], right[condition][at] = log_prob, count, is_right
    examples = np.array([example for example, _ in place])
    return ProbeScores(examples, log_probs, num_tokens, {"accuracy": right}, [])


def _under_conditions(shown, examples, scenes, others, processor, seed):
    """Examples under each condition in turn: E of the first, E of the next."""
    scene_of = {example: number for number, scene in enumerate(scenes) for example in scene.examples}
    found = []
    for condition in shown:
        opens = [
            images_under(condition, scene, scenes[other], processor.image_processor, seed)
            for scene, other in zip(scenes, others)
        ]
        for number, example in enumerate(examples):
            found.append(replace(example, name=f"{example.name}, {condition}", images=opens[scene_of[number]]))
    return found


def _answer_all(model, processor, task, shown, under, cache, console):
    """{condition: lines of its examples} of all that is asked under all conditions.

    Raises:
        ValueError: one cannot be asked.
    """
    with progress(console, task.name, len(under), len(cache.done)) as advance:
        predict(model, processor, task, under, cache, advance)
    lines = [cache.done[index] for index in range(len(under))]
    if wrong := [line for line in lines if "bad" in line]:
        raise ValueError(f"{wrong[0]['name']}: {wrong[0]['bad']}")
    count = len(under) // len(shown)
    return {condition: lines[place * count : (place + 1) * count] for place, condition in enumerate(shown)}


def _choose(model, processor, task, examples, shown, under, cache, console):
    """`ProbeScores` of a task whose answers are chosen by likelihood."""
    lines = _answer_all(model, processor, task, shown, under, cache, console)
    log_probs = {name: np.array([line["reference_log_prob"] for line in found]) for name, found in lines.items()}
    num_tokens = np.array([line["reference_tokens"] for line in lines["right"]])
    wanted = [example.references[0] for example in examples]
    right = {
        name: np.array([float(line["chosen"] == answer) for line, answer in zip(found, wanted)])
        for name, found in lines.items()
    }
    scores = {"accuracy": right}
    if task.generates:
        scores |= _task_scores(task, examples, lines, ["generated_accuracy"])
    return ProbeScores(np.arange(len(examples)), log_probs, num_tokens, scores, [])


def _speak(model, processor, task, examples, shown, under, cache, console):
    """The task's own scores of what a model says freely: {name: {condition: float[E]}}."""
    lines = _answer_all(model, processor, task, shown, under, cache, console)
    names = {"captions": ["cider_d"], "vqa": ["exact_accuracy", "vqa_accuracy"]}[task.name]
    return _task_scores(task, examples, lines, names)


def _task_scores(task, examples, lines, names):
    of_each = {condition: task.score(examples, found) for condition, found in lines.items()}
    return {
        name: {condition: np.array([one[name] for one in scores]) for condition, scores in of_each.items()}
        for name in names
    }
