"""What is asked, what is right, and what is counted: captions, questions, classes, statements.

A `Task` makes examples of rows, scores of predictions, and metrics of scores. How predictions come about
(`vora.eval.predict`) and where rows lie (`vora.eval.rows`) it need not know.
"""

from dataclasses import dataclass
from itertools import islice

import numpy as np

from vora.data.prompts import DEFAULT_PROMPTS, TRUE_FALSE
from vora.data.record import PLACE
from vora.eval.caption_scores import bleu_4, bleu_counts, cider_d
from vora.eval.intervals import interval_of, mean, share
from vora.eval.rows import Example
from vora.eval.vqa_scores import exact_accuracy, normalised, soft_accuracy
from vora.eval.wups import THRESHOLDS, wups


@dataclass
class Task:
    """The base of all tasks.

    Args:
        prompt: the question; what a row asks stands at `{}`. None: the task's own, that of `vora.data.prompts`.
        labels: the classes, where the data does not name all.
        max_examples: the first so many.
        seed: of what is drawn.
    """

    prompt: str | None = None
    labels: list | None = None
    max_examples: int | None = None
    seed: int = 0
    name = ""
    max_new_tokens = 16
    generates = True  # predictions have `generated`, a free answer
    num_beams = 1  # of that answer's search; 1: each token the likeliest
    chooses = False  # predictions have `chosen`, the likeliest candidate
    by_picture = True  # examples of one picture are drawn together
    top = 1  # of the candidates, so many of the best are scored for certain; None: all

    default_prompt = "{}"

    def __post_init__(self):
        self.prompt = self.prompt or self.default_prompt
        if self.prompt.count("{}") != self.default_prompt.count("{}"):
            wanted = "exactly one {}, where the row's text goes" if "{}" in self.default_prompt else "no {}"
            raise ValueError(f"The prompt {self.prompt!r} is to have {wanted}.")

    def asked(self, text=""):
        """The question to one example."""
        return self.prompt.replace("{}", text)

    def examples(self, rows, bad):
        """All examples of `rows`; rows that are none are added to `bad`."""
        return list(islice(self._each(rows, bad), self.max_examples))

    def _each(self, rows, bad):
        for row in rows.read(bad):
            try:
                found = list(self.of_row(row))
            except ValueError as error:
                bad.add(row.name, error)
                continue
            yield from found

    def of_row(self, row):
        """The examples of a `Row`; raises ValueError where it has none."""
        raise NotImplementedError

    def score(self, examples, predictions):
        """Scores of each example: a list of dicts. A score may depend on the other examples, as CIDEr-D does."""
        return [self.score_one(example, prediction) for example, prediction in zip(examples, predictions)]

    def score_one(self, example, prediction):
        raise NotImplementedError

    def metrics(self, examples, scores):
        """{metric: {"value", "interval"}}; here the mean of each score."""
        groups = [example.group for example in examples]
        names = scores[0] if scores else ()
        return {name: share([one[name] for one in scores], groups, self.seed) for name in names}


class Captions(Task):
    """Captions held against people's."""

    name, max_new_tokens, num_beams = "captions", 40, 3
    default_prompt = DEFAULT_PROMPTS.caption[0]

    def of_row(self, row):
        captions = _listed(_first(row.values, "captions", "caption", "text"))
        captions = [_text(caption) for caption in captions if _text(caption)]
        if not captions:
            raise ValueError("It has 0 captions.")
        yield Example(row.name, self.asked(), captions, row.pictures, row.number)

    def score(self, examples, predictions):
        told, wanted = [one["generated"] for one in predictions], [example.references for example in examples]
        return [
            {"cider_d": float(score), "bleu_counts": bleu_counts(*pair)}
            for score, *pair in zip(cider_d(told, wanted), told, wanted)
        ]

    def metrics(self, examples, scores):
        """CIDEr-D's interval is that of a mean over pictures, n-grams' weights being fixed; BLEU's of the corpus."""
        groups, counts = [example.group for example in examples], [one["bleu_counts"] for one in scores]
        return {
            "cider_d": mean([one["cider_d"] for one in scores], groups, self.seed),
            "bleu_4": interval_of(bleu_4, counts, groups, self.seed),
        }


class Vqa(Task):
    """Free answers to questions."""

    name, max_new_tokens = "vqa", 20

    def of_row(self, row):
        if "questions" in row.values or "answers" not in row.values:
            questions = _listed(_first(row.values, "questions", "question"))
            answers = _listed(_first(row.values, "answers", "answer"))
            if len(questions) != len(answers):
                raise ValueError(f"It has {len(questions)} questions, but {len(answers)} answers.")
        else:  # several people's answers to one question
            questions, answers = [_first(row.values, "question")], [row.values["answers"]]
        for number, (question, told) in enumerate(zip(questions, answers)):
            told = [_text(one) for one in _listed(told)]
            told = [one for one in told if one]
            if not told or not _text(question):
                raise ValueError(f"Question {number} has no text or no answer.")
            prompt = self.asked(PLACE.sub("", str(question)))  # pictures come first
            yield Example(f"{row.name}#{number}", prompt, told, row.pictures, row.number)

    def score_one(self, example, prediction):
        told = prediction["generated"]
        scores = {
            "exact_accuracy": exact_accuracy(told, example.references),
            "vqa_accuracy": soft_accuracy(told, example.references),
        }
        wanted = max(example.references, key=example.references.count)
        return scores | {f"wups_{threshold}": wups(told, wanted, threshold) for threshold in THRESHOLDS}


class Classify(Task):
    """One of many classes, chosen by likelihood and, separately, said freely."""

    name, chooses = "classify", True
    default_prompt = DEFAULT_PROMPTS.label[0]

    def examples(self, rows, bad):
        found = list(self._each(rows, bad))
        known = self.labels or sorted({example.references[0] for example in found})
        candidates = tuple(dict.fromkeys(known))
        kept = []
        for example in found:
            if example.references[0] in candidates:
                example.candidates = candidates
                kept.append(example)
            else:
                bad.add(example.name, f"Its label {example.references[0]!r} is none of the {len(candidates)} classes.")
        return kept[: self.max_examples]

    def of_row(self, row):
        label = _first(row.values, "label")
        if isinstance(label, int) and not isinstance(label, bool) and self.labels:
            if not 0 <= label < len(self.labels):
                raise ValueError(f"Its label {label} is none of the {len(self.labels)} classes.")
            label = self.labels[label]
        if not _text(label):
            raise ValueError("It has no label.")
        yield Example(row.name, self.asked(), [_text(label)], row.pictures, row.number)

    def score_one(self, example, prediction):
        wanted = example.references[0]
        return {
            "accuracy": float(prediction["chosen"] == wanted),
            "generated_accuracy": float(normalised(prediction["generated"]) == normalised(wanted)),
        }


class Statements(Task):
    """Whether a statement about a picture is true, by which of the two words is likelier."""

    name, generates, chooses, top = "statements", False, True, None
    by_picture = False  # but those of one sentence
    default_prompt = DEFAULT_PROMPTS.statement[0]

    def of_row(self, row):
        sentence = str(_first(row.values, "sentence", "statement", "question", "text"))
        truth = str(_first(row.values, "label", "answer")).strip().lower()
        if truth not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError(f"Its label {truth!r} is neither true nor false.")
        answer = TRUE_FALSE[0] if truth in ("true", "1", "yes") else TRUE_FALSE[1]
        picture = str(row.values.get("identifier", row.number)).rsplit("-", 1)[0]
        # all that is said with one sentence is drawn together; the orderings of one picture are of one kind
        yield Example(
            row.name,
            self.asked(sentence),
            [answer],
            row.pictures,
            sentence,
            TRUE_FALSE,
            f"{picture} {sentence}",
        )

    def score_one(self, example, prediction):
        return {"accuracy": float(prediction["chosen"] == example.references[0])}

    def metrics(self, examples, scores):
        right = [one["accuracy"] for one in scores]
        sentences = [example.group for example in examples]
        return {
            "accuracy": share(right, sentences, self.seed),
            # as NLVR has it: sentences that are judged rightly for every picture they come with
            "consistency": self._all_right(right, sentences, sentences),
            # pictures that are judged rightly in every ordering of their boxes
            "ordering_consistency": self._all_right(right, [example.kind for example in examples], sentences),
        }

    def _all_right(self, right, together, groups):
        worst, group_of = {}, {}
        for score, name, group in zip(right, together, groups):
            worst[name] = min(score, worst.get(name, 1.0))
            group_of[name] = group
        return share(list(worst.values()), [group_of[name] for name in worst], self.seed)


def _first(values, *names):
    """The first column that a row has.

    Raises:
        ValueError: it has none of them.
    """
    for name in names:
        if values.get(name) is not None:
            return values[name]
    raise ValueError(f"It has no {' or '.join(names)}, only {', '.join(sorted(values))}.")


def _listed(value):
    return list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value]


def _text(value):
    """Text of a text, a number, or of one person's answer as VQA has them; white space is made single."""
    value = value.get("answer", value.get("raw")) if isinstance(value, dict) else value
    return "" if value is None else " ".join(str(value).split())
