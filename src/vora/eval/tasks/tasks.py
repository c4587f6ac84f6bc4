"""What is asked, what is right, and what is counted: captions, questions, classes, statements.

A `Task` makes examples of rows, scores of predictions, and metrics of scores. How predictions come about
(`vora.eval.scoring.predict`) and where rows lie (`vora.eval.rows`) it need not know.
"""

from dataclasses import dataclass
from itertools import islice

from vora.data.prompts import DEFAULT_PROMPTS, TRUE_FALSE
from vora.data.schema import PLACE, as_list, as_text, check_choice_answers
from vora.eval.metrics.captions import bleu_4, bleu_counts, cider_d
from vora.eval.metrics.intervals import interval_of, mean, share
from vora.eval.metrics.vqa import exact_accuracy, normalised, soft_accuracy
from vora.eval.rows import Example


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
    by_image = True  # examples of one image are drawn together
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
                found = list(self.of_row(row, bad))
            except ValueError as error:
                bad.add(row.name, error)
                continue
            yield from found

    def of_row(self, row, bad):
        """The examples of a `Row`; raises ValueError where it has none. Single questions of it that are none are added
        to `bad`."""
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

    def examples(self, rows, bad):
        """As of all tasks; rows of one image, as where each caption has its own, are one example."""
        found = {}
        for example in self._each(rows, bad):
            if example.group not in found and len(found) == self.max_examples:
                break
            first = found.setdefault(example.group, example)
            if first is not example:
                first.references += example.references
        return list(found.values())

    def of_row(self, row, bad):
        captions = as_list(_first(row.values, "captions", "caption", "text"))
        captions = [told for told in (text_of(caption, "caption") for caption in captions) if told]
        if not captions:
            raise ValueError("It has 0 captions.")
        yield Example(row.name, self.asked(), captions, row.images, row.image_key())

    def score(self, examples, predictions):
        told, wanted = [one["generated"] for one in predictions], [example.references for example in examples]
        return [
            {"cider_d": float(score), "bleu_counts": bleu_counts(*pair)}
            for score, *pair in zip(cider_d(told, wanted), told, wanted)
        ]

    def metrics(self, examples, scores):
        """CIDEr-D's interval is that of a mean over images, n-grams' weights being fixed; BLEU's of the corpus. Of
        one image there is no CIDEr-D: what its words weigh is counted over others."""
        groups, counts = [example.group for example in examples], [one["bleu_counts"] for one in scores]
        told = [one["cider_d"] for one in scores] if len(scores) > 1 else []
        return {
            "cider_d": mean(told, groups, self.seed),
            "bleu_4": interval_of(bleu_4, counts, groups, self.seed),
        }


class Vqa(Task):
    """Free answers to questions."""

    name, max_new_tokens = "vqa", 20

    def of_row(self, row, bad):
        if "questions" in row.values or "answers" not in row.values:
            questions = as_list(_first(row.values, "questions", "question"))
            answers = as_list(_first(row.values, "answers", "answer"))
            if len(questions) != len(answers):
                raise ValueError(f"It has {len(questions)} questions, but {len(answers)} answers.")
        else:  # several people's answers to one question
            questions, answers = [_first(row.values, "question")], [row.values["answers"]]
        for number, (question, told) in enumerate(zip(questions, answers)):
            try:
                prompt, told = self._question(row, question, as_list(told))
            except ValueError as error:  # the others of its image are worth asking
                bad.add(f"{row.name}#{number}", error)
                continue
            yield Example(f"{row.name}#{number}", prompt, told, row.images, row.number)

    def _question(self, row, question, told):
        """(prompt, answers) of one question; raises ValueError where it has none."""
        references = [answer for answer in (text_of(one, "answer") for one in told) if answer]
        asked = PLACE.sub("", exact_text(question, "question"))  # images come first
        if not references or not asked.strip():
            raise ValueError("It has no text or no answer.")
        if len(references) == 1:  # several people's numbers are what they counted
            check_choice_answers(row.values, [_said(one) for one in told if _said(one) is not None])
        return self.asked(asked), references

    def score_one(self, example, prediction):
        told = prediction["generated"]
        return {
            "exact_accuracy": exact_accuracy(told, example.references),
            "vqa_accuracy": soft_accuracy(told, example.references),
        }


class Classify(Task):
    """One of many classes, chosen by likelihood and, separately, said freely."""

    name, chooses = "classify", True
    default_prompt = DEFAULT_PROMPTS.label[0]

    def examples(self, rows, bad):
        found = list(self._each(rows, bad))
        known = self.labels or sorted({example.references[0] for example in found})
        candidates = tuple(dict.fromkeys(known))
        if len(candidates) == 1:
            raise ValueError(
                f"The {len(found)} examples have one class, {candidates[0]!r}, so that any model would be right: name "
                "all classes with --labels."
            )
        kept = []
        for example in found:
            if example.references[0] in candidates:
                example.candidates = candidates
                kept.append(example)
            else:
                bad.add(example.name, f"Its label {example.references[0]!r} is none of the {len(candidates)} classes.")
        return kept[: self.max_examples]

    def of_row(self, row, bad):
        label = class_name(_first(row.values, "label"), self.labels)
        if not label:
            raise ValueError("It has no label.")
        yield Example(row.name, self.asked(), [label], row.images, row.number)

    def score_one(self, example, prediction):
        wanted = example.references[0]
        return {
            "accuracy": float(prediction["chosen"] == wanted),
            "generated_accuracy": float(normalised(prediction["generated"]) == normalised(wanted)),
        }


class Statements(Task):
    """Whether a statement about an image is true, by which of the two words is likelier."""

    name, generates, chooses, top = "statements", False, True, None
    by_image = False  # but those of one sentence
    default_prompt = DEFAULT_PROMPTS.statement[0]

    def of_row(self, row, bad):
        sentence = exact_text(_first(row.values, "sentence", "statement", "question", "text"), "sentence")
        truth = text_of(_first(row.values, "label", "answer"), "label").lower()
        if truth not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError(f"Its label {truth!r} is neither true nor false.")
        answer = TRUE_FALSE[0] if truth in ("true", "1", "yes") else TRUE_FALSE[1]
        image = str(row.values.get("identifier", row.number)).rsplit("-", 1)[0]
        # all that is said with one sentence is drawn together; the orderings of one image are of one kind
        yield Example(
            row.name,
            self.asked(sentence),
            [answer],
            row.images,
            sentence,
            TRUE_FALSE,
            f"{image} {sentence}",
        )

    def score_one(self, example, prediction):
        return {"accuracy": float(prediction["chosen"] == example.references[0])}

    def metrics(self, examples, scores):
        right = [one["accuracy"] for one in scores]
        sentences = [example.group for example in examples]
        return {
            "accuracy": share(right, sentences, self.seed),
            # as NLVR has it: sentences that are judged rightly for every image they come with
            "consistency": self._all_right(right, sentences, sentences),
            # images that are judged rightly in every ordering of their boxes
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


def class_name(label, labels):
    """The name of a class, which its row gives by name or by number.

    Args:
        labels: names of all classes in the order of their numbers, or None.

    Raises:
        ValueError: its number has no name.
    """
    name = text_of(label, "label")
    if isinstance(label, (bool, str)) or not name:
        return name
    if not labels:
        raise ValueError(f"Its label {name} is a number: name all classes, in the order of these, with --labels.")
    if not (name.isdecimal() and int(name) < len(labels)):
        raise ValueError(f"Its label {name} is none of the {len(labels)} classes.")
    return labels[int(name)]


def text_of(value, what):
    """As `exact_text`, white space made single."""
    return " ".join(exact_text(value, what).split())


def exact_text(value, what):
    """Text of a text, a number, or of one person's caption or answer as COCO and VQA have them.

    Args:
        what: it is, for the message.

    Raises:
        ValueError: it is something else.
    """
    value = _said(value)
    text = "" if value is None else as_text(value)
    if not isinstance(text, str):
        raise ValueError(f"Its {what} is a {type(value).__name__}, not text.")
    return text


def _said(value):
    """What one person said, whose name or number stands beside it."""
    known = [value[name] for name in ("answer", "raw") if name in value] if isinstance(value, dict) else []
    return known[0] if known else value
