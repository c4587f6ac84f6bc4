"""Files to records: an image, or none, and the conversations about it."""

import json
from collections import defaultdict
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from datasets import Image as ImageFeature
from datasets import load_dataset
from PIL import Image

from vora.model.wheel_files import wheel_files

EASY_VQA = "easy-vqa"


@dataclass
class Record:
    """One picture (path, PIL image, encoded bytes, or None for text alone) and independent conversations about it.

    Args:
        name: says where the record stands, for messages about bad ones.
        conversations: lists of messages whose content is text; the picture goes before the first user's text.
    """

    name: str
    image: Any
    conversations: list

    def messages(self, opened, conversation):
        """A conversation with the opened picture in it, as the processor takes it."""
        if opened is None:
            return conversation
        first, *rest = conversation
        content = [{"type": "image", "image": opened}, {"type": "text", "text": first["content"]}]
        return [{**first, "content": content}, *rest]

    def open_image(self):
        """The picture as the processor takes it; encoded bytes are decoded.

        Raises:
            ValueError: the bytes are no image.
        """
        if not isinstance(self.image, bytes):
            return self.image
        try:
            return Image.open(BytesIO(self.image))
        except OSError as error:
            raise ValueError(f"Cannot read its image: {error}") from None


class EasyVqa:
    """The pictures and questions of the package easy-vqa 1.0 (MIT): 64-pixel shapes, 13 answers.

    Args:
        split: `train` (4,000 pictures, 38,575 questions) or `test` (1,000 and 9,673).
    """

    def __init__(self, split):
        self.folder = wheel_files("easy-vqa==1.0") / "easy_vqa" / "data" / split
        by_image = defaultdict(list)
        for question, answer, image in json.loads((self.folder / "questions.json").read_text()):
            by_image[image].append((question, answer))
        self.pictures = sorted(by_image.items())

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        image, pairs = self.pictures[index]
        path = self.folder / "images" / f"{image}.png"
        return Record(str(path), str(path), [question_and_answer(*pair) for pair in pairs])


class Table:
    """Rows of Parquet or JSON Lines files: a picture in `image` (encoded, or a path beside the file) with
    `question(s)` and `answer(s)`, with `caption(s)`, or with `messages` of plain text; or `messages` alone.

    Raises:
        ValueError: no file is found, no row is in them, or no layout is recognised.
    """

    def __init__(self, path, split, caption_prompts):
        self.path, self.caption_prompts = Path(path), caption_prompts
        files = [self.path] if self.path.is_file() else _files_of(self.path, split)
        if not files:
            raise ValueError(
                f"{path} holds no Parquet or JSON Lines files of the split {split!r}: check data.sources."
            )
        kind = "parquet" if files[0].suffix == ".parquet" else "json"
        self.root = files[0].parent
        try:
            self.rows = load_dataset(kind, data_files=[str(file) for file in files], split="train")
        except Exception as error:  # datasets raises its own and pyarrow's kinds
            raise ValueError(f"Cannot read {files[0]} as {kind}: {' '.join(str(error).split())[:200]}") from None
        columns = set(self.rows.column_names)
        if len(self.rows) == 0:
            raise ValueError(f"{path} holds 0 rows: an empty dataset cannot be trained on.")
        layouts = [{"question", "answer"}, {"questions", "answers"}, {"caption"}, {"captions"}, {"messages"}]
        if not any(layout <= columns for layout in layouts):
            raise ValueError(
                f"{path} has the columns {sorted(columns)}: none of the layouts question and answer, caption, messages."
            )
        if isinstance(self.rows.features.get("image"), ImageFeature):
            self.rows = self.rows.cast_column("image", ImageFeature(decode=False))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        image = row.get("image")
        if isinstance(image, dict):
            image = image["bytes"] or image["path"]
        if isinstance(image, str) and (self.root / image).exists():
            image = str(self.root / image)
        return Record(f"{self.path}:{index}", image, self._conversations(row))

    def _conversations(self, row):
        if row.get("messages"):
            return [row["messages"]]
        if "captions" in row or "caption" in row:
            captions = row.get("captions") or [row["caption"]]
            prompts = self.caption_prompts
            return [question_and_answer(prompts[i % len(prompts)], text) for i, text in enumerate(captions)]
        questions, answers = row.get("questions") or [row["question"]], row.get("answers") or [row["answer"]]
        return [question_and_answer(*pair) for pair in zip(questions, answers)]


def question_and_answer(question, answer):
    """Two messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def load_source(path, split="train", caption_prompts=("Describe the image.",), max_samples=None):
    """A sequence of `Record`s: the name `easy-vqa`, a file, or a folder of files named after splits.

    Raises:
        ValueError: nothing usable is there.
    """
    source = EasyVqa(split) if path == EASY_VQA else Table(path, split, list(caption_prompts))
    return source if max_samples is None else [source[i] for i in range(min(max_samples, len(source)))]


def _files_of(folder, split):
    files = [*folder.glob("*.parquet"), *folder.glob("*.jsonl")]
    return sorted(file for file in files if file.stem == split or file.stem.startswith(f"{split}-"))
