"""The names of columns, and rows with these names and without what says nothing."""

import difflib
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from vora.data.prompts import DEFAULT_PROMPTS, Prompts

Row = dict[str, Any]

MOST_ROW_BYTES = 16 << 20  # of the text of a row: what is made of it takes many times as much memory

IMAGE_COLUMNS = ("image", "images", "frames", "video", "videos")
SOUND_COLUMNS = ("audio", "audios")
UNREAD_COLUMNS = ("tools", "functions", "chat_template_kwargs")  # of what an assistant is given besides
LEARN_KEYS = ("weight", "loss", "loss_mask", "loss_scale", "train", "training")  # OpenAI, ms-swift, verl and axolotl
TURN_COLUMNS = ("messages", "conversations")
LEAD_COLUMNS = ("system", "history")  # what comes before the rest of a row
CHOICE_COLUMNS = ("choices", "options")
CHOICE_LETTERS = (*"ABCDEF", *"abcdef")  # columns of one choice each
TEXT_COLUMNS = (
    *TURN_COLUMNS, *LEARN_KEYS, "weights", *UNREAD_COLUMNS, "objects", "kto_tag", *LEAD_COLUMNS, "texts", "question",
    "answer", "questions", "answers", "caption", "captions", "sentence", "statement", "label", "identifier",
    "instruction", "input", "context", "output", "text", "id", *CHOICE_COLUMNS, *CHOICE_LETTERS, *SOUND_COLUMNS,
)  # fmt: skip
COLUMNS = (*IMAGE_COLUMNS, *TEXT_COLUMNS, "file_name")
LAYOUTS: tuple[Set[str], ...] = (  # the first that a row has is read
    {*TURN_COLUMNS}, {"texts"}, {"question", "questions", "answer", "answers"}, {"caption", "captions"},
    {"sentence", "statement", "label"}, {"instruction", "output", "input", "context"}, {"text"},
)  # fmt: skip
SYNONYMS: tuple[Set[str], ...] = (  # of these one is read
    {*IMAGE_COLUMNS}, {*TURN_COLUMNS}, {"questions", "question"}, {"answers", "answer"},
    {"captions", "caption", "text"}, {"sentence", "statement"},
)  # fmt: skip


@dataclass(frozen=True)
class RowOptions:
    """How rows are read."""

    prompts: Prompts = DEFAULT_PROMPTS  # one is drawn for each row that comes without a question, always the same
    columns: Mapping[str, str] = field(default_factory=dict)  # {our name: the file's}, which go before `SYNONYMS`
    allow_urls: bool = False  # fetch images from URLs; otherwise a row that names one is bad

    def __post_init__(self) -> None:
        if wrong := [name for name in self.columns if name not in COLUMNS]:
            near = difflib.get_close_matches(wrong[0], COLUMNS, n=1)
            known = f"did you mean {near[0]}?" if near else f"known are {', '.join(COLUMNS)}."
            raise ValueError(f"columns: {wrong[0]} is no column of ours (ours: theirs); {known}")


def usable(row: Mapping[str, Any], columns: Mapping[str, str]) -> Row:
    """A row under our names, without columns that hold nothing: null, NaN, empty lists, as merged schemas have them.
    ValueError if a text is none, or sound or tools belong to it."""
    given = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    overruled: set[str] = set().union(*(alike for alike in SYNONYMS if alike & given.keys())) | {*columns.values()}
    row = {name: value for name, value in row.items() if name not in overruled} | given
    found = {}
    for name, value in row.items():
        value = _without_nan(value, name)
        may_be = list | dict | str | bytes if name in IMAGE_COLUMNS else list | dict
        if value is not None and not (isinstance(value, may_be) and not value):
            found[name] = value
    if sounds := [name for name in SOUND_COLUMNS if name in found]:
        raise ValueError(f"Its column {sounds[0]!r} holds sound, which is not understood: leave the row out.")
    if unread := [name for name in UNREAD_COLUMNS if not says_nothing(found.get(name))]:
        raise ValueError(
            f"Its column {unread[0]!r} changes what is asked, which is not understood: leave the row out."
        )
    return found


def says_nothing(value: Any) -> bool:
    """Whether a value is null or empty, or holds nothing else, as where schemas were merged."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return all(map(says_nothing, value))
    return value is None or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


def without_layouts_before(row: Row, named: Set[str]) -> Row:
    """A row without the layouts that would be read before the first one with a column that the user has named."""
    first = next((number for number, layout in enumerate(LAYOUTS) if layout & named), 0)
    before: set[str] = set().union(*LAYOUTS[:first])
    return {name: value for name, value in row.items() if name not in before}


def first_of(row: Mapping[str, Any], *names: str) -> Any:
    """What stands in the first of these columns that a row has; ValueError if it has none of them."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"It has no {' or '.join(names)}, only {', '.join(sorted(map(str, row)))}.")


def has_any(row: Mapping[str, Any], *names: str) -> bool:
    return any(name in row for name in names)


def too_large(size: int, what: str = "It", most: int = MOST_ROW_BYTES) -> ValueError:
    """What says that a row, or a part of it, is larger than it may be."""
    return ValueError(f"{what} has {size:,} bytes, and the limit is {most:,}: cut it, or leave it out.")


def _without_nan(value: Any, column: str) -> Any:
    """A value in which NaN, which is how tables and JSON of Python write null, is None."""
    if isinstance(value, dict):
        return {key: _without_nan(one, column) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one, column) for one in value]
    if isinstance(value, str) and len(value) > MOST_ROW_BYTES:
        raise too_large(len(value), f"Its column {column!r}")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half, place = value[error.start], error.start
            raise ValueError(
                f"Its column {column!r} holds {half!a}, half of a surrogate pair, at place {place}: that is no text, "
                "repair the file."
            ) from None
    return None if isinstance(value, float) and value != value else value
