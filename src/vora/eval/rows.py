"""Rows of any files that `vora.data.readers` reads, as evaluation needs them: texts at once, images when asked."""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from vora.data.columns import COLUMNS, IMAGE_COLUMNS, TEXT_COLUMNS, RowOptions, usable, without_layouts_before
from vora.data.columns import Row as Values
from vora.data.held_out import HeldOut, key_of_image
from vora.data.images import ImageSource, images_of_row, open_source
from vora.data.readers import EASY_VQA, KINDS, load_source
from vora.data.source import Source

Images: TypeAlias = Callable[[], list[Image.Image]]  # opens them; ValueError if one cannot be read
SPLITS = ("test", "validation", "valid", "val", "dev", "eval", "train")  # the first that a folder has is read
HALVES = ("choose", "report")  # what a model is chosen by, and what is said of it then
NUM_NAMED = 20  # bad rows that a report names


@dataclass(frozen=True)
class Data:
    """Where examples come from."""

    paths: Sequence[str | Path]  # files, folders or datasets, as `vora.data.readers.load_source` takes them
    split: str | None = None  # of folders and datasets; None: the first of `SPLITS` that is there
    subset: str | None = None  # of a dataset on the Hub
    image_folder: str | None = None  # where paths of images start
    columns: dict[str, str] | None = None  # {our name: the files' name}
    allow_urls: bool = False  # fetch images that rows name by URL; otherwise such rows are bad
    half: str | None = None  # of `HALVES`: the rows of one half of the images; None: all
    held_out: HeldOut | None = None  # only rows whose images are held out of a training

    def __post_init__(self) -> None:
        if self.half not in (None, *HALVES):
            raise ValueError(f"--half is {self.half!r}: say {' or '.join(HALVES)}.")

    @property
    def options(self) -> dict[str, Any]:
        """All but the paths, as reports name them."""
        return {name: value for name, value in asdict(self).items() if name != "paths"}

    def __str__(self) -> str:
        return ", ".join(map(str, self.paths))


@dataclass
class Example:
    """One request to a model."""

    name: str  # file, row and number of the question, for people
    prompt: str
    references: list[str]  # what is right, as the task understands it
    images: Images  # to ask about others, or none, replace it
    group: Hashable  # examples of one group (an image) are not independent of each other
    candidates: tuple[str, ...] = ()  # the answers to choose from, where it is not free
    kind: str = ""  # where a task knows several


@dataclass
class Row:
    """A row without its images; `images` opens them, `image_key` tells them from others, or raise ValueError."""

    name: str
    number: int
    values: Values
    images: Images
    image_key: Callable[[], str]


@dataclass
class SkippedRows:
    """What was left out, and why."""

    count: int = 0
    named: list[dict[str, str]] = field(default_factory=list)

    def add(self, name: str, cause: object) -> None:
        self.count += 1
        if len(self.named) < NUM_NAMED:
            self.named.append({"name": name, "cause": " ".join(str(cause).split())[:300]})

    def first(self) -> str:
        """A sentence about the first of them, for the message of an error."""
        if not self.count:
            return ""
        return f" The first of {self.count} bad rows, {self.named[0]['name']}: {self.named[0]['cause']}"


class Rows:
    """The rows of all files, in order; ValueError if a path cannot be read."""

    def __init__(self, data: Data) -> None:
        options = RowOptions(columns=data.columns or {}, allow_urls=data.allow_urls)
        given = {"subset": data.subset, "image_folder": data.image_folder, "options": options}
        texts = {**given, "read_row": _text_of_row, "wanted": TEXT_COLUMNS}
        images = {**given, "read_row": _images_of_row, "wanted": (*IMAGE_COLUMNS, "file_name"), "is_checked": False}
        self.data, paths, split = data, list(map(str, data.paths)), data.split
        self.texts = [_opened(path, split, texts) for path in paths]
        self.images = [cache(partial(_opened, path, split, images)) for path in paths]  # opened when first asked
        self.samples = [cache(partial(_opened, path, split, given | {"is_checked": False})) for path in paths]
        self.files = list(dict.fromkeys(file for source in self.texts for file in source.files))  # as rows come

    def read(self, skipped: SkippedRows) -> Iterator[Row]:
        """Each `Row`; those that cannot be read are added to `skipped`."""
        number = 0
        for texts, images, samples in zip(self.texts, self.images, self.samples):
            for block, size in enumerate(texts.block_sizes):
                rows = texts.read_block(block)
                for offset in range(size):
                    name = Path(texts.row_name(block, offset)).name
                    index = int(texts.starts[block]) + offset
                    try:
                        values = texts.item(block, offset, rows)
                        opens = partial(_open, images, index, self.data.allow_urls)
                        row = Row(name, number, values, opens, partial(_key_of, images, index))
                        if self._may_be_asked(images, samples, index, values):
                            yield row
                    except ValueError as error:
                        skipped.add(name, error)
                    number += 1

    def _may_be_asked(
        self, images: Callable[[], Source], samples: Callable[[], Source], index: int, values: Values
    ) -> bool:
        """Whether a row is of the half that is wanted, and held out where that is wanted: as in training, or, of a row
        that training cannot read, by its images."""
        if self.data.half is not None and self.data.half != _half_of(images, index, values):
            return False
        if (held_out := self.data.held_out) is None:
            return True
        try:
            return held_out.holds(samples()[index]) is True
        except ValueError:
            return held_out.holds_images(images()[index]) is True


def _half_of(images: Callable[[], Source], index: int, values: Values) -> str:
    """Which of `HALVES` a row belongs to, by its images (`key_of_image`), or without any by its text: in all files the
    same."""
    try:
        key = _hash(map(key_of_image, images()[index]))
    except ValueError:  # without one
        key = repr(sorted(values.items()))
    return HALVES[hashlib.blake2b(key.encode(), digest_size=1).digest()[0] % 2]


def _opened(path: str, split: str | None, given: dict[str, Any]) -> Source:
    """A source by the split that is named, or by the first of `SPLITS` that it has."""
    is_here = Path(path).exists() or path == EASY_VQA or any(mark in path for mark in "*?[")
    if not is_here and Path(path).suffix.lower() in KINDS:
        raise ValueError(f"{path}: there is no such file: check --data.")
    if split and Path(path).is_file():
        raise ValueError(f"--split {split} is of folders and datasets, and {path} is a file: leave it out.")
    if split or not Path(path).is_dir():
        return load_source(path, split or (SPLITS[0] if is_here else _split_on_hub(path, given["subset"])), **given)
    for name in SPLITS:
        try:
            return load_source(path, name, **given)
        except ValueError as error:
            cause = error
            if all(mark not in str(error) for mark in ("no files of the split", repr(name))):
                break
    raise cause


def _split_on_hub(path: str, subset: str | None) -> str:
    """The first of `SPLITS` of a dataset on the Hub."""
    import datasets

    try:
        names = datasets.get_dataset_split_names(path, subset)
    except Exception:  # of many kinds; what loads it says what is wrong
        return SPLITS[-1]
    return next((name for name in SPLITS if name in names), names[0])


def _text_of_row(row: Values, name: str, image_folder: str, options: RowOptions) -> Values:
    known = without_layouts_before(usable(row, options.columns), options.columns.keys())
    found = {key: value for key, value in known.items() if key not in IMAGE_COLUMNS}
    if not any(column in COLUMNS for column in found):
        raise ValueError(f"None of its columns {sorted(map(str, row))} holds text that is known: name them.")
    return found


def _images_of_row(row: Values, name: str, image_folder: str, options: RowOptions) -> list[ImageSource]:
    images = images_of_row(usable(row, options.columns), image_folder)
    if not images:
        raise ValueError(f"It has no image in {', '.join(IMAGE_COLUMNS)}.")
    return images


def _open(source: Callable[[], Source], index: int, allow_urls: bool) -> list[Image.Image]:
    """A row's images; of a video the frames one by one."""
    opened = [open_source(image, allow_urls) for image in source()[index]]
    return [frame for image in opened for frame in (image if isinstance(image, list) else [image])]


def _key_of(source: Callable[[], Source], index: int) -> str:
    """A hash of a row's files of images, or of the paths to them: nothing is decoded."""
    return _hash(image if isinstance(image, bytes) else repr(image).encode() for image in source()[index])


def _hash(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]
