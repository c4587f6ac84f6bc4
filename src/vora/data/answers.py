"""What a row says is right: captions, answers to questions, a class, the truth of a statement."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from vora.data.choices import check_names_no_choice, written
from vora.data.columns import Row, first_of, has_any


@dataclass
class Question:
    """A question and what people answered, empty answers left out."""

    text: str
    answers: list[str]

    @property
    def most_frequent(self) -> str:
        return Counter(self.answers).most_common(1)[0][0]


@dataclass
class Statement:
    """A sentence and whether it is true; `image` names the image of several rows, as NLVR's identifier."""

    sentence: str
    truth: bool
    image: str | None


def captions_of(row: Row) -> list[str]:
    """The captions of a row's image that say something, as they are; ValueError if there is none."""
    given = as_list(first_of(row, "captions", "caption", "text"))
    captions = [caption for one in given if (caption := text_of(one, "caption")).strip()]
    if not captions:
        raise ValueError("It has 0 captions.")
    return captions


def has_questions(row: Row) -> bool:
    """Whether a row holds questions and answers."""
    return has_any(row, "question", "questions") and has_any(row, "answer", "answers")


def questions_of(row: Row) -> list[Question | ValueError]:
    """The questions of a row; of one that is none the error, so that the others can be asked. ValueError if the row
    has no questions, or not as many answers."""
    if "questions" in row or "answers" not in row:
        questions = as_list(first_of(row, "questions", "question"))
        answers = as_list(first_of(row, "answers", "answer"))
        if len(questions) != len(answers):
            raise ValueError(f"It has {len(questions)} questions, but {len(answers)} answers.")
    else:  # several people's answers to one question
        questions, answers = [first_of(row, "question")], [row["answers"]]
    return [_question_of(row, question, given) for question, given in zip(questions, answers)]


def _question_of(row: Row, question: Any, answers: Any) -> Question | ValueError:
    try:
        if question is None:
            raise ValueError("Its question is null.")
        said = [answer for answer in map(_said, as_list(answers)) if answer is not None]
        texts = [text for answer in said if (text := text_of(answer, "answer")).strip()]
        asked = "\n".join(filter(None, [context_of(row).strip(), text_of(question, "question")]))
        check_names_no_choice(row, asked, said)
        return Question(asked, texts)
    except ValueError as error:
        return error


def context_of(row: Row) -> str:
    """What is read before a question: a text, or texts in lists (also as `contexts` or `sentences`, PubMedQA's and
    HotpotQA's), a line for each; ValueError if it is something else."""
    try:
        return "\n".join(filter(None, _texts_in(row.get("context"))))
    except ValueError as error:
        raise ValueError(f"{error} Leave it out: columns: {{id: context}} reads it as what is not asked.") from None


def _texts_in(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = next((value[key] for key in ("contexts", "sentences") if key in value), value)
    if isinstance(value, (list, tuple)):
        return [text for one in value for text in _texts_in(one)]
    return [text_of(value, "context")]


def class_of(row: Row, classes: Sequence[str] | None) -> str:
    """The name of a row's class, which it gives by name, or by number in `classes`, the names of all, if they are
    known; ValueError if there is no label, or its number has no name."""
    label = first_of(row, "label")
    name = " ".join(text_of(label, "label").split())
    if not name:
        raise ValueError("It has no label.")
    if isinstance(label, (bool, str)):
        return name
    if not classes:
        raise ValueError(
            f"Its label {name} is a number: give the name of the class, or `vora eval` all names, in the order of the "
            "numbers, with --labels."
        )
    if not (name.isdecimal() and int(name) < len(classes)):
        raise ValueError(f"Its label {name} is none of the {len(classes)} classes.")
    return classes[int(name)]


def statement_of(row: Row) -> Statement:
    """The statement of a row; ValueError if there is none, or it is neither true nor false."""
    sentence = text_of(first_of(row, "sentence", "statement", "question", "text"), "sentence")
    truth = text_of(first_of(row, "label", "answer"), "label").strip().lower()
    if truth not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError(f"Its sentence has the label {truth!r}, which is neither true nor false.")
    image = None if row.get("identifier") is None else str(row["identifier"]).rsplit("-", 1)[0]
    return Statement(sentence, truth in ("true", "1", "yes"), image)


def tasks_of(row: Row) -> list[str]:
    """The evaluation tasks that a row's columns are for."""
    states = has_any(row, "sentence", "statement")
    fits = {
        "captions": has_any(row, "captions", "caption") or ("text" in row and "label" not in row),
        "vqa": has_questions(row),
        "statements": states and has_any(row, "label", "answer"),
        "classify": "label" in row and not states,
    }
    return [name for name, fit in fits.items() if fit]


def as_list(value: Any) -> list[Any]:
    """A list; of one thing, a list of it; of a list of dicts that is stored by columns, the dicts."""
    if isinstance(value, dict) and value and all(isinstance(column, (list, tuple)) for column in value.values()):
        return [dict(zip(value, values)) for values in zip(*value.values())]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def text_of(value: Any, what: str) -> str:
    """Text of a text, a number, or of one person's caption or answer as COCO and VQA have them; of nothing, none.
    ValueError, which names `what` it is, of something else."""
    value = _said(value)
    if value is None:
        return ""
    if isinstance(value, Decimal):  # of Parquet's exact numbers
        value = int(value) if value == int(value) else float(value)
    if not isinstance(value, (str, bool, int, float)):
        raise ValueError(f"Its {what} is a {type(value).__name__}, not text.")
    return written(value)


def _said(value: Any) -> Any:
    """What one person said, whose name or number stands beside it."""
    known = [value[name] for name in ("answer", "raw") if name in value] if isinstance(value, dict) else []
    return known[0] if known else value
