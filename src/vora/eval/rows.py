"""Rows of any files that `vora.data.readers` reads, as evaluation needs them: texts at once, images when asked."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from vora.data.readers import EASY_VQA, KINDS, load_source
from vora.data.schema import IMAGE_COLUMNS, VideoBytes, VideoPath, images_of_row, without_empty
from vora.model.image_processing_vora import Video, read_image

SPLITS = (
    "test",
    "validation",
    "valid",
    "val",
    "dev",
    "eval",
    "train",
)  # the first that a folder or dataset has is read
COLUMNS = (
    "captions", "caption", "text", "questions", "question", "answers", "answer", "label", "sentence",
    "statement", "identifier", "choices", "options",
)  # fmt: skip
NUM_NAMED = 20  # bad rows that a report names


@dataclass
class Example:
    """One thing that a model is asked.

    Args:
        name: file, row and number of the question, for people.
        prompt: what is asked.
        references: what is right, as the task understands it.
        images: opens the images, a list of RGB images; to ask about others, or none, replace it.
        group: examples of one group (an image) are not independent of each other.
        candidates: the answers to choose from, where it is not free.
        kind: of the example, where a task knows several.
    """

    name: str
    prompt: str
    references: Any
    images: Callable[[], list]
    group: Any
    candidates: tuple = ()
    kind: str = ""


@dataclass
class Row:
    """A row without its images; `images` opens them, `image_key` tells them from others, or raise ValueError."""

    name: str
    number: int
    values: dict
    images: Callable[[], list]
    image_key: Callable[[], str]


@dataclass
class SkippedRows:
    """What was left out, and why."""

    count: int = 0
    named: list = field(default_factory=list)

    def add(self, name, cause):
        self.count += 1
        if len(self.named) < NUM_NAMED:
            self.named.append({"name": name, "cause": " ".join(str(cause).split())[:300]})

    def first(self):
        """A sentence about the first of them, for the message of an error."""
        if not self.count:
            return ""
        return f" The first of {self.count} bad rows, {self.named[0]['name']}: {self.named[0]['cause']}"


class Rows:
    """The rows of all files, in order.

    Args:
        paths: what `load_source` takes, each.
        split: of folders and datasets; None: the first of `SPLITS` that is there.
        columns: {our name: the files' name}.
        wanted: the columns that are read, where a file allows to leave out others.

    Raises:
        ValueError: a path cannot be read.
    """

    def __init__(self, paths, split=None, subset=None, image_folder=None, columns=None, wanted=COLUMNS):
        options = {"subset": subset, "image_folder": image_folder, "columns": columns}
        self.paths, self.texts, self.images = list(map(str, paths)), [], []
        for path in map(str, paths):
            self.texts.append(_opened(path, split, {**options, "read_row": _values_of, "wanted": wanted}))
            images = {**options, "read_row": _images_of, "wanted": (*IMAGE_COLUMNS, "file_name"), "is_checked": False}
            self.images.append(cache(partial(_opened, path, split, images)))  # when the first is asked for
        self.files = list(dict.fromkeys(file for source in self.texts for file in source.files))  # as rows come

    def __len__(self):
        return sum(map(len, self.texts))

    def __str__(self):
        return ", ".join(self.paths)

    def read(self, bad):
        """Yields each `Row`; those that cannot be read are added to `bad`."""
        number = 0
        for texts, images in zip(self.texts, self.images):
            for block, size in enumerate(texts.block_sizes):
                rows = texts.read_block(block)
                for offset in range(size):
                    name = _short(texts.row_name(block, offset))
                    index = int(texts.starts[block]) + offset
                    try:
                        values = texts.record(block, offset, rows)
                        check_unicode(values)
                        yield Row(name, number, values, _opener(images, index), partial(_key_of, images, index))
                    except ValueError as error:
                        bad.add(name, error)
                    number += 1


def check_unicode(values: dict[str, Any]) -> None:
    """Raise ValueError where a row's text holds half of a surrogate pair, which no tokenizer takes."""
    for name, value in values.items():
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"Its {name} holds {half!r}, half of a surrogate pair: it is no Unicode text.") from None


def _opened(path, split, options):
    """A source by the split that is named, or by the first of `SPLITS` that it has."""
    is_pattern = any(mark in path for mark in "*?[")
    if not Path(path).exists() and Path(path).suffix.lower() in KINDS and not is_pattern:
        raise ValueError(f"{path}: there is no such file.")
    if split or not Path(path).is_dir():
        return load_source(path, split or _split_on_hub(path, options["subset"]), **options)
    for name in SPLITS:
        try:
            return load_source(path, name, **options)
        except ValueError as error:
            cause = error
            if all(word not in str(error) for word in ("no files of the split", repr(name))):
                break
    raise cause


def _split_on_hub(path, subset):
    """The first of `SPLITS` of a dataset on the Hub; of a file, any."""
    if Path(path).exists() or path == EASY_VQA or any(mark in path for mark in "*?["):
        return SPLITS[0]
    import datasets

    try:
        names = datasets.get_dataset_split_names(path, subset)
    except Exception:  # of many kinds; what loads it says what is wrong
        return SPLITS[-1]
    return next((name for name in SPLITS if name in names), names[0])


def _values_of(row, name, image_folder, prompts):
    values = {key: value for key, value in row.items() if value is not None and key not in IMAGE_COLUMNS}
    if not values:
        raise ValueError(f"It has none of the columns {', '.join(COLUMNS)}: name its own with --column ours=theirs.")
    return values


def _images_of(row, name, image_folder, prompts):
    images = images_of_row(without_empty(row), image_folder)
    if not images:
        raise ValueError(f"It has no image in {', '.join(IMAGE_COLUMNS)}.")
    return images


def _opener(source, index):
    return lambda: [frame for image in source()[index] for frame in _frames_of(image)]


def _key_of(source, index):
    """A hash of a row's files of images, or of the paths to them: nothing is decoded."""
    found = hashlib.sha256()
    for image in source()[index]:
        found.update(image if isinstance(image, bytes) else repr(image).encode())
    return found.hexdigest()[:16]


def _frames_of(image):
    """An image, or a video's frames one by one, as training reads them."""
    return Video(image).frames if isinstance(image, (list, VideoPath, VideoBytes)) else [read_image(image)]


def _short(name):
    return Path(name).name
