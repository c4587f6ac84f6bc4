"""From what a user names (a file, a folder, a dataset's id) to the source that reads it."""

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from vora.build.fetch import wheel_files
from vora.build.hub import may_be_hub_id
from vora.data.columns import COLUMNS, Row, RowOptions
from vora.data.csv_source import Csv
from vora.data.files import files_of, no_files, say_once
from vora.data.guess import ways_to_name
from vora.data.image_folder import ImageFolder, image_root
from vora.data.json_source import UTF8_MARK, JsonArray, JsonLines
from vora.data.parquet_source import Arrow, Parquet, prepared_files
from vora.data.schema import to_sample
from vora.data.source import ReadRow, Source
from vora.data.tar_source import WebDataset

EASY_VQA = "easy-vqa"
KINDS: dict[str, type[Source]] = {
    ".parquet": Parquet, ".jsonl": JsonLines, ".json": JsonArray, ".tar": WebDataset, ".arrow": Arrow,
    ".csv": Csv, ".tsv": Csv,
}  # fmt: skip
COCO = re.compile(rb'"images"\s*:\s*\[\s*\{[^]]*"(file_name|coco_url)"')  # in the first of its lines


class EasyVqa(Source):
    """The images and questions of the package easy-vqa 1.0 (MIT): 64-pixel shapes, 13 answers. Its splits are `train`
    (4,000 images, 38,575 questions) and `test` (1,000 and 9,673)."""

    def __init__(self, split: str, **further: Any) -> None:
        self.folder = wheel_files("easy-vqa==1.0") / "easy_vqa" / "data" / split
        by_image = defaultdict(list)
        for question, answer, image in json.loads((self.folder / "questions.json").read_text()):
            by_image[image].append((question, answer))
        self.images = sorted(by_image.items())
        super().__init__(EASY_VQA, [self.folder / "questions.json"], **further)

    def _scanned(self, file: str) -> Iterator[Sequence[int]]:
        yield 0, len(self.images)

    def _read(self, file: str, *place: int) -> list[Row]:
        return [
            {"image": f"images/{image}.png", "questions": [q for q, _ in pairs], "answers": [a for _, a in pairs]}
            for image, pairs in self.images
        ]

    def row_name(self, block: int, offset: int) -> str:
        return str(self.folder / "images" / f"{self.images[offset][0]}.png")


def load_source(
    path: str | Path,
    split: str = "train",
    options: RowOptions = RowOptions(),
    *,
    subset: str | None = None,
    image_folder: str | Path | None = None,
    max_samples: int | None = None,
    read_row: ReadRow = to_sample,
    wanted: Collection[str] = COLUMNS,
    is_checked: bool = True,
) -> Source:
    """Open what a recipe's source names, by default as a sequence of `Sample`s; ValueError if nothing usable is there.

    Args:
        path: the name `easy-vqa`; a file or a pattern such as `shards/*.tar`; a folder of files, named after splits or
            not, in itself or in `data/`; a folder of images with captions beside them, or in folders named as their
            classes; a folder of `datasets.save_to_disk`; or the id of a dataset on the Hub.
        split: of those the folder or the dataset has.
        subset: of a dataset on the Hub.
        options, image_folder, max_samples, read_row, wanted, is_checked: see `Source`.
    """
    given: dict[str, Any] = {"options": options, "max_samples": max_samples, "read_row": read_row, "wanted": wanted}
    if path == EASY_VQA:
        return EasyVqa(split, **given | {"options": RowOptions(options.prompts)})
    given |= {"image_folder": image_folder, "is_checked": is_checked}
    files = files_of(str(path), split, tuple(KINDS))
    if files is None:
        return Arrow(str(path), prepared_files(str(path), subset, split), **given)
    if not files:
        if (root := image_root(Path(path), split, tuple(KINDS))) is None:
            raise no_files(str(path), split, tuple(KINDS))
        return ImageFolder(str(path), root, **given)
    kinds = {_kind_of(file) for file in files}
    if len(kinds) > 1:
        raise ValueError(f"{path} mixes {', '.join(sorted(kind.__name__ for kind in kinds))}: name files of one kind.")
    try:
        source = kinds.pop()(str(path), files, **given)
    except (OSError, pa.ArrowException) as error:
        cause = getattr(error, "strerror", None) or " ".join(str(error).split())[:300]
        raise ValueError(f"Cannot read {path}: {cause}. Check the file, and who may read it.") from None
    if source.guessed and is_checked:
        unread = ", ".join(source.columns_not_read) or "none"
        say_once(f"{path}: its columns are guessed, {ways_to_name(source.guessed)}; not read: {unread}")
    if source.guessed_folder and is_checked:
        folder = source.guessed_folder
        say_once(f"{path}: its images lie in {folder}, image_folder: {folder} or --image-folder {folder}")
    for name, image in source.images_not_read.items() if is_checked else ():
        say_once(
            f"{path}: column {name!r} names images, such as {image}, and is NOT read: if they belong to the rows, "
            f"{ways_to_name({'image': name})} (paths start at image_folder, by default where the file lies)"
        )
    return source


def check_is_there(path: str, split: str) -> None:
    """Raise ValueError for a file, folder or pattern that is not on this machine, without reading it or the hub."""
    if path != EASY_VQA and files_of(path, split, tuple(KINDS)) is None and not may_be_hub_id(path):
        prepared_files(path, None, split)


def _kind_of(file: Path) -> type[Source]:
    """The class that reads a file. JSON Lines are often called .json: they begin with an object, not with a list.
    ValueError of one object that holds all, as COCO's."""
    kind = KINDS[file.suffix.lower()]
    if kind is not JsonArray:
        return kind
    with file.open("rb") as text:
        beginning = text.read(1 << 16).removeprefix(UTF8_MARK).lstrip()
    if not beginning.startswith(b"{"):
        return JsonArray
    first = beginning.partition(b"\n")[0]
    if first.strip() == b"{" or COCO.search(first):
        raise ValueError(
            f"{file} is one JSON object, and a list of rows, or one row per line, is wanted. Of COCO's, join the "
            'annotations to rows such as {"image": "a.jpg", "captions": ["...", "..."]}.'
        )
    return JsonLines
