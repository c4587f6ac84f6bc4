"""Choices beside a question, in every spelling, and answers that name one which is not shown."""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from vora.data.columns import CHOICE_COLUMNS, CHOICE_LETTERS, Row

MARK = re.compile(  # of a choice: "A. ", "(b) ", "1) "; "3:4" and "0.5" are none
    r"(?:^|(?<=\s))[(\[]?(?:[A-Za-z][)\].:]+\s*|\d{1,2}[)\].]+\s+)(?=\S)"
)
FIRST_MARK = re.compile(r"^" + MARK.pattern)
NAME = r"[\s()\[\].:*]*\w[\s()\[\].:*]*"
NAMES_CHOICES = re.compile(  # "A", "Option (a)", "B, C", "A and C", "ABD"
    rf"(?:(?:option|choice|answer)s?\b)?{NAME}(?:(?:[,;/&+]|\band\b|\bor\b)+{NAME})*|[A-Z]{{2,9}}", re.IGNORECASE
)
LONGEST = 10_000  # characters of choices that are read as values: Python's parser has no limit of its own
WORD = re.compile(r"[^\W\d_]{2}")


def written(value: Any) -> str:
    """A value as text; of a whole number without a point, as it has in a column of which some are missing."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def check_names_no_choice(row: Row, asked: str, answers: Sequence[Any]) -> None:
    """Raise ValueError where an answer is numbers or letters of choices, and what is `asked` does not show the
    choices. Of several people's answers letters alone count: their numbers are what they counted."""
    choices, asked = _choices_of(row), _plain(asked)
    if all(_is_shown(choice, letter, number, asked) for number, (letter, choice) in enumerate(choices.items())):
        return
    for answer in answers:
        if _is_name(answer, choices, len(answers) == 1) and _plain(answer) not in choices.values():
            raise ValueError(
                f"Its answer {answer!r} is none of its {len(choices)} choices: give the text of the right one, and "
                "put the choices into the question if they are to be chosen from."
            )


def _is_name(answer: Any, choices: Mapping[str, str], is_alone: bool) -> bool:
    """Whether an answer is made of letters of choices; one that stands alone, also of numbers or unknown letters."""
    if not isinstance(answer, str):
        return is_alone and isinstance(answer, (int, float))
    if not NAMES_CHOICES.fullmatch(answer):
        return False
    if answer.isalpha() and len(answer) > 1:  # letters in a row, each once and in order, or a word
        return answer.isupper() and sorted({*answer}) == [*answer] and {*answer.casefold()} <= choices.keys()
    names = re.findall(r"\b\w\b", answer.casefold())
    return is_alone or all(name.isalpha() and name in choices for name in names)


def _choices_of(row: Row) -> dict[str, str]:
    """{letter: choice} of the columns for all choices, or for one each, of which there are several."""
    given = next((row[column] for column in CHOICE_COLUMNS if column in row), None)
    if given is None:
        given = {letter: row[letter] for letter in CHOICE_LETTERS if letter in row}
        given = given if len(given) > 1 else {}
    given = _read(given) if isinstance(given, str) else given
    if isinstance(given, Mapping):
        given = given.get("text", given)
    if isinstance(given, (list, tuple)):
        texts = [one.get("text") if isinstance(one, Mapping) else one for one in given]
        given = {ascii_uppercase[n] if n < len(ascii_uppercase) else str(n): text for n, text in enumerate(texts)}
    if not isinstance(given, Mapping):
        return {}
    known = {_plain(letter): written(text).strip() for letter, text in given.items() if text is not None}
    return {letter: _plain(FIRST_MARK.sub("", text)) for letter, text in known.items() if text}


def _read(text: str) -> Any:
    """Choices in one text: JSON, a list as Python writes it, a line for each, or letters before each."""
    for read in (json.loads, ast.literal_eval) if len(text) <= LONGEST else ():
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    lines = text.strip().splitlines()
    found = [one for one in (lines if len(lines) > 1 else MARK.split(text)) if one.strip()]
    return found if len(found) > 1 else []


def _is_shown(choice: str, letter: str, number: int, asked: str) -> bool:
    """Whether a choice stands in a text; one without a word, as a number, may stand there by chance, so that it
    counts only after its letter or number."""
    names = "|".join(map(re.escape, (letter, str(number), str(number + 1))))
    before = r"(?<!\w)" if WORD.search(choice) else rf"(?<!\w)(?:{names})[\W_]+"
    return re.search(rf"{before}{re.escape(choice)}(?!\w)", asked) is not None


def _plain(value: Any) -> str:
    return " ".join(written(value).casefold().split())
