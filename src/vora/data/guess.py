"""What columns are that have other names than ours, guessed from their names and from what stands in them; and the
folder that paths of images start at, from what is there.

Nothing is guessed that a row says by our own names, but where its images are, if it names files that are there.
"""

import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vora.data.columns import COLUMNS, IMAGE_COLUMNS, LAYOUTS, TURN_COLUMNS, Row
from vora.data.images import IMAGE_ENDINGS, REMOTE, is_media, looks_like_media

# how people name them, the likeliest first; of "Question Text" and "questionText" all but letters is left out
NAMES: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversation", "conversations", "dialog", "dialogue", "chat", "turns"),
    "question": ("question", "query", "prompt", "questiontext", "problem", "user", "human", "userprompt"),
    "answer": ("answer", "response", "answertext", "completion", "reply", "solution", "groundtruth", "assistant",
               "gpt", "multiplechoiceanswer", "modelresponse", "target"),
    "caption": ("caption", "captions", "alttext", "alt", "description", "recaption", "captiontext", "longcaption",
                "detailedcaption", "blipcaption", "sentences", "raw", "title", "prompt", "txt", "text"),
    "label": ("label", "class", "classname", "labelname", "category", "categoryname", "species", "breed"),
    "instruction": ("instruction",),
    "output": ("output", "response"),
    "text": ("text", "content", "body", "document"),
}  # fmt: skip
WITH_IMAGE = (("messages",), ("question", "answer"), ("caption",), ("label",))
ALONE = (("messages",), ("question", "answer"), ("instruction", "output"), ("text",))


def guessed_columns(
    rows: Iterable[Row | ValueError], columns: Mapping[str, str], image_folder: str | Path | None = None
) -> dict[str, str]:
    """{our name: the file's} of what some first rows have under other names than those that a source's `columns` say;
    empty where nothing is missing, or nothing is like it. Paths of images start at `image_folder`."""
    ours = {theirs: ours for ours, theirs in columns.items()}
    good = [{ours.get(name, name): value for name, value in row.items()} for row in rows if isinstance(row, dict)]
    values = {str(name): _first(row.get(name) for row in good) for row in good for name in row}
    values = {name: value for name, value in values.items() if value is not None}
    found: dict[str, str] = {}
    if not values.keys() & {*IMAGE_COLUMNS, *TURN_COLUMNS, "file_name"}:
        found = _image(values, image_folder)
    has_image = bool(found or values.keys() & {*IMAGE_COLUMNS, "file_name"})
    if not _is_complete(values.keys(), has_image):
        free = {name: value for name, value in values.items() if name not in (*IMAGE_COLUMNS, *found.values())}
        found |= next(filter(None, (_layout(names, free) for names in (WITH_IMAGE if has_image else ALONE))), {})
    return {ours: theirs for ours, theirs in found.items() if ours != theirs}


def columns_read(rows: Iterable[Row | ValueError], columns: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """({our name: the file's} of what is read, names of what is not) of some first rows, with a source's `columns`."""
    names = list(dict.fromkeys(str(name) for row in rows if isinstance(row, dict) for name in row))
    ours = {name: name for name in names if name in COLUMNS and name not in columns.values()}
    ours |= {name: theirs for name, theirs in columns.items() if theirs in names}
    layout = next((layout for layout in LAYOUTS if layout & ours.keys()), set[str]())
    known = {*IMAGE_COLUMNS, *layout, "system", "history", *(() if ours.keys() & {*IMAGE_COLUMNS} else ("file_name",))}
    read = {name: theirs for name, theirs in ours.items() if name in known}
    return read, [name for name in names if name not in read.values()]


def images_not_read(rows: Iterable[Row | ValueError], read: Iterable[str], unread: Iterable[str]) -> dict[str, str]:
    """{column: the first image} of what names images in some first rows, of which none is read. `read` and `unread`
    are of `columns_read`."""
    if {*read} & {*IMAGE_COLUMNS, "file_name"}:
        return {}
    first = {name: _first(row.get(name) for row in rows if isinstance(row, dict)) for name in unread}
    return {name: path for name, value in first.items() if (path := _image_path(value))}


def folder_of_images(rows: Iterable[Row | ValueError], folder: str | Path) -> str | None:
    """The only folder in one that holds the first image that some first rows name, where it does not lie in that one
    itself; None where it does, or where none or several hold it."""
    values = (value for row in rows if isinstance(row, dict) for value in row.values())
    path = next(filter(None, map(_image_path, values)), None)
    if path is None or path.startswith(REMOTE) or Path(folder, path).is_file() or not Path(folder).is_dir():
        return None
    with os.scandir(folder) as entries:
        found = [entry.path for entry in entries if entry.is_dir() and Path(entry.path, path).is_file()]
    return found[0] if len(found) == 1 else None


def line_to_paste(columns: Mapping[str, str]) -> str:
    """Columns as a recipe takes them."""
    pairs = ", ".join(f"{ours}: {_quoted(theirs)}" for ours, theirs in columns.items())
    return f"{{{pairs}}}"


def ways_to_name(columns: Mapping[str, str]) -> str:
    """Columns as a recipe takes them, and as the command line does."""
    options = " ".join(f"--column {shlex.quote(f'{ours}={theirs}')}" for ours, theirs in columns.items())
    return f"columns: {line_to_paste(columns)} or {options}"


def _is_complete(names: Iterable[str], has_image: bool) -> bool:
    """Whether our own names make a row that has something to learn."""
    have = {*names}
    if have & {*TURN_COLUMNS, "texts", "sentence", "statement"} or {"instruction", "output"} <= have:
        return True
    if have & {"question", "questions"} and have & {"answer", "answers"}:
        return True
    return bool(have & {"caption", "captions", "text", "label"}) if has_image else "text" in have


def _image(values: Mapping[str, Any], folder: str | Path | None) -> dict[str, str]:
    """The column that holds images by its name and what stands in it; none where there are several. A name that says
    nothing, such as `file`, will do where that is a file, or a row of text alone would be nothing to learn from."""
    media = [name for name, value in values.items() if is_media(value) or _is_list(value, is_media)]
    likely = [name for name in media if looks_like_media(name) or _plain(name) in IMAGE_COLUMNS]
    chosen = likely or [name for name in media if isinstance(values[name], (bytes, dict))]
    if not chosen:
        paths = {name: path for name, value in values.items() if (path := _image_path(value))}
        is_text = _is_complete(values.keys(), False)
        chosen = [
            name for name, path in paths.items() if not is_text or (folder and os.path.isfile(Path(folder, path)))
        ]
    return {"image": chosen[0]} if len(chosen) == 1 else {}


def _image_path(value: Any) -> str | None:
    """The path of an image that a column holds, or its list begins with."""
    path = value[0] if isinstance(value, list) and value else value
    return path if isinstance(path, str) and path.lower().endswith(tuple(f".{one}" for one in IMAGE_ENDINGS)) else None


def _layout(names: Sequence[str], values: Mapping[str, Any]) -> dict[str, str]:
    """The columns of a layout, of each the likeliest that is not taken; none where one is missing."""
    found: dict[str, str] = {}
    for name in names:
        fits = [other for other in values if other not in found.values() and _can_be(name, values[other])]
        ranked = sorted((NAMES[name].index(plain), other) for other in fits if (plain := _plain(other)) in NAMES[name])
        if not ranked:
            return {}
        found[name] = ranked[0][1]
    return found


def _can_be(name: str, value: Any) -> bool:
    if name == "messages":
        return isinstance(value, list) and bool(value) and isinstance(value[0], dict)
    if name == "caption" and _is_list(value, lambda one: isinstance(one, str)):
        return True
    return isinstance(value, str) or (name in ("answer", "label") and isinstance(value, (int, float)))


def _is_list(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and holds(value[0])


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None and value != "" and value != []), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_]\w*", name) else f'"{name}"'
