"""What text ability is measured on: documents in windows, and questions with choices.

Questions come in the columns of the usual sets:

    question, choices {text, label}, answerKey   ARC, CommonsenseQA; with question_stem OpenBookQA
    question, choices [...], answer              MMLU; the answer is a number from 0, a letter, or one of the choices
    ctx (or ctx_a and ctx_b), endings, label     HellaSwag
    goal, sol1, sol2, label                      PIQA

All else is held text: `.txt` files, and rows as training reads them: `text`, of which every token counts that has
something before it; `messages` and the like, of which what the assistant says counts.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vora.data.prompts import DEFAULT_PROMPTS
from vora.data.schema import TEXT_COLUMNS, as_text, record_of_row
from vora.eval.rows import Rows

QUESTION_COLUMNS = (
    "choices",
    "answerKey",
    "ctx",
    "ctx_a",
    "ctx_b",
    "endings",
    "goal",
    "sol1",
    "sol2",
    "question_stem",
)
WINDOW = 1024  # tokens that are read at once; each is scored with at least half of them before it, where there are


@dataclass
class Window:
    """A part of a document: all of it is read, and of its tokens those not scored before are scored.

    Args:
        sample: as of `share_prefixes`.
        document: its number.
        num_bytes: of what is scored.
    """

    name: str
    sample: dict
    document: int
    num_bytes: float


@dataclass
class Question:
    """A beginning, the ways to go on, and the number of the right one."""

    name: str
    context: str
    choices: list
    right: int


def read_items(paths, processor, length, bad, max_examples=None, **rows_options):
    """All windows and questions of some files.

    Args:
        length: tokens of a window.
        bad: gets the rows that are neither.
        max_examples: the first so many documents and questions together.

    Returns:
        (list of `Window`s, list of `Question`s, the files).
    """
    texts, rows = open_items(paths, **rows_options)
    windows, questions, number = [], [], 0
    for name, values in [*((file.name, {"text": _text_of(file)}) for file in texts), *_named(rows, bad)]:
        if max_examples is not None and number == max_examples:
            break
        try:
            if question := question_of(values, name):
                questions.append(question)
            else:
                windows += [one for text in _documents(values, name, processor)
                            for one in windows_of(*text, length, name, number)]  # fmt: skip
            number += 1
        except ValueError as error:
            bad.add(name, error)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            bad.add(name, f"It is not built as its layout is: {type(error).__name__}: {error}")
    return windows, questions, [*map(str, texts), *rows.files]


def open_items(paths, **rows_options):
    """(files of text, `Rows` of all others).

    Raises:
        ValueError: one is not there.
    """
    texts = [Path(path) for path in paths if str(path).lower().endswith(".txt")]
    if missing := [file for file in texts if not file.exists()]:
        raise ValueError(f"{missing[0]}: there is no such file.")
    others = [path for path in paths if Path(path) not in texts]
    return texts, Rows(others, wanted=TEXT_COLUMNS + QUESTION_COLUMNS, **rows_options)


def _text_of(file):
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot read {file}: {error}") from None


def _named(rows, bad):
    for row in rows.read(bad):
        yield row.name, row.values


def question_of(values, name=""):
    """A row's `Question`, or None where it is no question with choices.

    Raises:
        ValueError: its right answer is none of its choices.
    """
    if "endings" in values:
        context = values.get("ctx") or f"{values.get('ctx_a', '')} {values.get('ctx_b', '')}".strip()
        choices, answer, labels = list(values["endings"]), values.get("label"), None
    elif "sol1" in values:
        context, choices = f"Question: {values['goal']}\nAnswer:", [values["sol1"], values["sol2"]]
        answer, labels = values.get("label"), None
    elif "choices" in values:
        given = values["choices"]
        choices, labels = (given["text"], given.get("label")) if isinstance(given, dict) else (given, None)
        asked = values["question"] if "question" in values else values["question_stem"]
        context, choices = f"Question: {asked}\nAnswer:", list(choices)
        answer = values.get("answerKey", values.get("answer"))
    else:
        return None
    told = [str(as_text(choice)) for choice in choices]
    return Question(name, context, told, _right(answer, choices, labels))


def _right(answer, choices, labels):
    is_number = isinstance(answer, (int, float)) and not isinstance(answer, bool)
    if isinstance(answer, float) and any(isinstance(choice, float) for choice in choices):
        is_number = False  # one of the choices, no place
    answer = as_text(answer)
    if labels is None and is_number and answer in map(str, range(len(choices))):
        return int(answer)  # also where the choices are numbers
    letters = [chr(ord("A") + number) for number in range(len(choices))]
    numbers = [str(number) for number in range(len(choices))]
    for names in (labels, choices, letters, numbers):
        told = [str(as_text(name)) for name in names or ()]
        if str(answer) in told:
            return told.index(str(answer))
    raise ValueError(f"Its answer {answer!r} is none of its {len(choices)} choices.")


def _documents(values, name, processor):
    """(tokens int[T], which of them are scored bool[T], bytes of these) of each conversation of a row."""
    for conversation in record_of_row(values, name, ".", DEFAULT_PROMPTS).conversations:
        if conversation[0]["role"] == "text":
            yield _plain(conversation[0]["content"], processor)
            continue
        sample = processor.training_sample(conversation)
        spoken = "".join(message["content"] for message in conversation if message["role"] == "assistant")
        yield sample["input_ids"], sample["labels"] != -100, len(spoken.encode())


def _plain(text, processor):
    ids = np.array(processor.tokenizer(text)["input_ids"])
    if len(ids) < 2 or processor.image_token_id in ids:
        raise ValueError(f"Its text {text[:50]!r} is too short, or holds the image token {processor.image_token}.")
    scored = np.arange(len(ids)) > 0
    first = processor.tokenizer.decode(ids[:1], skip_special_tokens=True)
    return ids, scored, len(text.encode()) - len(first.encode())


def windows_of(ids, scored, num_bytes, length, name="", document=0):
    """A document in windows, of which each goes on half its length after the one before: every token that counts is
    scored once."""
    found, done = [], 1
    per_token = num_bytes / max(1, scored[1:].sum())
    while done < len(ids):
        end = min(len(ids), length if not found else done + length // 2)
        start = max(0, end - length)
        targets = np.where(scored, ids, -100)[start + 1 : end]
        targets[: done - start - 1] = -100
        if count := int((targets != -100).sum()):
            last = end - start - 2
            sample = {
                "input_ids": ids[start : end - 1],
                "targets": targets,
                "position_ids": np.arange(last + 1),
                "seen_until": np.full(last + 1, last),
                "ends": np.array([last]),
                "num_samples": 1,
            }
            found.append(Window(name, sample, document, per_token * count))
        done = end
    return found
