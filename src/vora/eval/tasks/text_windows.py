"""Held text in windows: `.txt` files, and rows as training reads them.

Of `text` every token counts that has something before it; of `messages` and the like, what the assistant says.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vora.data.columns import Row
from vora.data.packing import TokenSample, share_prefixes
from vora.data.schema import to_sample
from vora.data.turns import text_in
from vora.eval.rows import Data, Rows, SkippedRows
from vora.model.processing_vora import VoraProcessor

WINDOW = 1024  # tokens that are read at once; each is scored with at least half of them before it, where there are


@dataclass
class Window:
    """A part of a document: all of it is read, and of its tokens those not scored before are scored."""

    name: str
    sample: TokenSample
    document: int  # its number
    num_bytes: float  # of what is scored


def read_windows(
    data: Data, processor: VoraProcessor, length: int, skipped: SkippedRows, max_samples: int | None = None
) -> tuple[list[Window], list[str]]:
    """All windows, `length` tokens long, of the first `max_samples` documents, and the files; `skipped` gets the rows
    that hold no text."""
    texts, rows = open_texts(data)
    windows: list[Window] = []
    number = 0
    for name, values in _named(texts, rows, skipped):
        if max_samples is not None and number == max_samples:
            break
        try:
            documents = list(_documents(values, name, processor))
            windows += [one for text in documents for one in windows_of(*text, length, name, number)]
            number += 1
        except ValueError as error:
            skipped.add(name, error)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            skipped.add(name, f"It is not built as its layout is: {type(error).__name__}: {error}")
    return windows, [*map(str, texts), *rows.files]


def open_texts(data: Data) -> tuple[list[Path], Rows]:
    """(files of text, `Rows` of all others); ValueError if one is not there."""
    texts = [Path(path) for path in data.paths if str(path).lower().endswith(".txt")]
    if missing := [file for file in texts if not file.exists()]:
        raise ValueError(f"{missing[0]}: there is no such file: check --data.")
    return texts, Rows(replace(data, paths=[path for path in data.paths if Path(path) not in texts]))


def windows_of(
    ids: np.ndarray, scored: np.ndarray, num_bytes: float, length: int, name: str = "", document: int = 0
) -> list[Window]:
    """A document (tokens int[T], which of them count bool[T], bytes of these) in windows, of which each goes on half
    its length after the one before: every token that counts is scored once."""
    found: list[Window] = []
    done, per_token = 1, num_bytes / max(1, scored[1:].sum())
    while done < len(ids):
        end = min(len(ids), length if done == 1 else done + length // 2)
        start = max(0, end - length)
        labels = np.where(scored, ids, -100)[start:end]
        labels[: done - start] = -100
        if count := int((labels != -100).sum()):
            sample = share_prefixes([{"input_ids": ids[start:end], "labels": labels}])
            found.append(Window(name, sample, document, per_token * count))
        done = end
    return found


def _named(texts: Sequence[Path], rows: Rows, skipped: SkippedRows) -> Iterator[tuple[str, Row]]:
    for file in texts:
        try:
            yield file.name, {"text": file.read_text(encoding="utf-8")}
        except (OSError, ValueError) as error:
            raise ValueError(f"Cannot read {file}: {error}") from None
    for row in rows.read(skipped):
        yield row.name, row.values


def _documents(values: Row, name: str, processor: VoraProcessor) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """(tokens int[T], which of them are scored bool[T], bytes of these) of each conversation of a row, in several
    parts where the chat template has it so."""
    for conversation in to_sample(values, name).conversations:
        if conversation[0]["role"] == "text":
            yield _plain(conversation[0]["content"], processor)
            continue
        samples = processor.training_samples(conversation)
        answers = [one for one in conversation if one["role"] == "assistant" and one.get("learn", True)]
        num_bytes = len("".join(map(text_in, answers)).encode())
        scored = [sample["labels"] != -100 for sample in samples]
        per_token = num_bytes / max(1, sum(one.sum() for one in scored))
        for sample, one in zip(samples, scored):
            yield sample["input_ids"], one, per_token * one.sum()


def _plain(text: str, processor: VoraProcessor) -> tuple[np.ndarray, np.ndarray, int]:
    ids = np.array(processor.text_ids(text))
    if len(ids) < 2:
        raise ValueError(f"Its text {text[:50]!r} is too short.")
    scored = np.arange(len(ids)) > 0
    first = processor.tokenizer.decode(ids[:1], skip_special_tokens=True)
    return ids, scored, len(text.encode()) - len(first.encode())
