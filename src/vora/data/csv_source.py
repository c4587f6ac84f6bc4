"""Tables as text: CSV and TSV, whose first line names the columns.

The csv module splits cells; what it lacks are places in the file, and going on after a row that is broken.
"""

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from vora.data.columns import IMAGE_COLUMNS, MOST_ROW_BYTES, Row, too_large
from vora.data.json_source import UTF8_MARK
from vora.data.source import MOST_BLOCK_BYTES, Source, bytes_of

DELIMITERS = ",;\t"  # of a CSV the one that the first line has most of
LISTS = (*IMAGE_COLUMNS, "questions", "answers", "captions", "texts", "history", "choices", "options")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
Cells = list[str] | ValueError  # in latin-1, one to one with the file's bytes; or what is wrong with a row

csv.field_size_limit(MOST_ROW_BYTES)


class Csv(Source):
    """Rows of cells; an empty cell is null. A cell of a column that may hold lists (`LISTS`) is text, or a list in
    JSON; a caption is a list where that is one of texts; a label that is written as a number is one."""

    def _scanned(self, file: str) -> Iterator[Sequence[int]]:
        _, dialect, first = _heads(file)
        with open(file, "rb") as text:
            rows = records(text, dialect, first)
            yield from self._in_blocks((start, end) for start, end, cells in rows if _is_row(cells))

    def _read(self, file: str, *place: int) -> list[Row | ValueError]:
        names, dialect, _ = _heads(file)
        ours = {theirs: ours for ours, theirs in self.options.columns.items()}
        kinds = [ours.get(name, name) for name in names]
        if (size := place[1] - place[0]) > MOST_BLOCK_BYTES:
            return [too_large(size)]
        rows = records(io.BytesIO(bytes_of(file, *place)), dialect)
        return [_row(names, kinds, cells) for _, _, cells in rows if _is_row(cells)]


class Dialect(NamedTuple):
    """How cells are parted; where the first line has spaces after delimiters, those of others are no part of cells."""

    delimiter: str
    skips_spaces: bool = False


def _heads(file: str) -> tuple[list[str], Dialect, int]:
    """(names of a file's columns, dialect, byte after the first line); ValueError if they are not to be read."""
    with open(file, "rb") as text:
        beginning = text.read(1 << 12)
        start = len(UTF8_MARK) if beginning.startswith(UTF8_MARK) else 0
        if b"\0" in beginning:
            raise ValueError(f"{file} is no table in UTF-8: save it as CSV in UTF-8.")
        kinds = "\t" if Path(file).suffix.lower() == ".tsv" else DELIMITERS
        first = beginning.partition(b"\n")[0].decode("latin-1")
        delimiter = max(kinds, key=first.count)
        dialect = Dialect(delimiter, f"{delimiter} " in first and delimiter != "\t")
        _, end, cells = next(records(text, dialect, start), (0, 0, []))
    if isinstance(cells, ValueError):
        raise ValueError(f"The first line of {file} is to name its columns. {cells}")
    names = [_decoded("first line", cell).strip() for cell in cells]
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise ValueError(f"{file} has {names.count(twice[0])} columns of the name {twice[0]!r}: rename them.")
    return names, dialect, end


def records(text: IO[bytes], dialect: Dialect, start: int = 0) -> Iterator[tuple[int, int, Cells]]:
    """(first byte, byte after the last, cells) of each row; a blank one has none. A line with which a broken row
    begins is one bad row, and the next line is read anew: a quote that never ends takes no others with it."""
    while True:
        text.seek(start)
        ends: list[int] = []  # of the lines of the row at hand
        lines, (delimiter, skips) = _lines(text, ends, start), dialect
        reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=skips, strict=True)
        try:
            for cells in reader:
                yield start, ends[-1], cells
                start = ends[-1]
                ends.clear()
            return
        except (csv.Error, _TooLarge) as error:
            end = ends[0]
            cause = too_large(end - start) if end - start > MOST_ROW_BYTES else ValueError(f"It is no row: {error}.")
            yield start, end, cause
            start = end


def _is_row(cells: Cells) -> bool:
    """Not what is blank, nor what spreadsheets leave at the end of a table, cells that are all empty."""
    return isinstance(cells, ValueError) or any(cells)


class _TooLarge(Exception):
    """A row goes on for longer than rows may be."""


def _lines(text: IO[bytes], ends: list[int], end: int) -> Iterator[str]:
    """Lines from the byte `end` on, in latin-1, the byte after each in `ends`; `_TooLarge` where those of one row are
    more than a row may be."""
    while line := text.readline(MOST_ROW_BYTES + 1):
        is_large, end = len(line) > MOST_ROW_BYTES, end + len(line)
        while is_large and line and not line.endswith(b"\n"):
            line = text.readline(MOST_ROW_BYTES)
            end += len(line)
        ends.append(end)
        if is_large or end - ends[0] > MOST_ROW_BYTES:
            raise _TooLarge("a quote is opened and not closed")
        yield line.decode("latin-1")


def _row(names: Sequence[str], kinds: Sequence[str], cells: Cells) -> Row | ValueError:
    """`kinds` are the columns' names as we call them."""
    if isinstance(cells, ValueError):
        return cells
    if len(cells) != len(names):
        return ValueError(f"It has {len(cells)} cells, but the first line names {len(names)} columns.")
    try:
        return {name: _value(kind, _decoded(name, cell)) for name, kind, cell in zip(names, kinds, cells) if cell}
    except ValueError as error:
        return error


def _value(kind: str, cell: str) -> object:
    """What a cell holds; ValueError if it looks like a list and is none in JSON: it would be learned as text."""
    if kind == "label":
        return _number(cell)
    if kind not in (*LISTS, "caption") or not (cell.startswith("[") and cell.endswith("]")):
        return cell
    try:
        found = json.loads(cell)
    except (ValueError, RecursionError):
        if kind == "caption":  # one may begin and end so
            return cell
        raise ValueError(f'Its {kind} are no list in JSON, such as ["a", "b"]: {cell[:80]}') from None
    return cell if kind == "caption" and not all(isinstance(one, str) for one in found) else found


def _number(cell: str) -> str | float:
    """A number where a label is one, however it is written (3, 3.0, -1, ³): no name of a class."""
    plain = unicodedata.normalize("NFKC", cell).strip()
    if not NUMBER.fullmatch(plain):
        return cell
    value = float(plain)
    return int(value) if value.is_integer() else value


def _decoded(name: str, cell: str) -> str:
    data = cell.encode("latin-1")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        place = error.start
        raise ValueError(
            f"Its {name} is not in UTF-8: its byte {place} is 0x{data[place]:02x}; convert the file."
        ) from None
