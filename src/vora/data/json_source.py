"""JSON Lines, and JSON files that hold one list.

A list is scanned once, and then read in parts, so places in the file are needed. Streaming JSON libraries do not give
them, and those that stand on yajl refuse the NaN that Python writes.
"""

import json
import re
from collections.abc import Iterator, Sequence

from vora.data.columns import MOST_ROW_BYTES, Row, too_large
from vora.data.source import MOST_BLOCK_BYTES, Source, bytes_of

SPACE = re.compile(r"[\s,]*")
DECODER = json.JSONDecoder()
UTF8_MARK = b"\xef\xbb\xbf"
MARKS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
DEEPER = {"[": 1, "{": 1, "]": -1, "}": -1}


class JsonLines(Source):
    """One JSON object per line."""

    def _scanned(self, file: str) -> Iterator[Sequence[int]]:
        return self._in_blocks(lines(file))

    def _read(self, file: str, *place: int) -> list[Row | ValueError]:
        if (size := place[1] - place[0]) > MOST_BLOCK_BYTES:
            return [too_large(size)]
        return [json_row(line) for line in bytes_of(file, *place).split(b"\n") if line.strip()]


class JsonArray(Source):
    """One JSON file that holds a list of objects, as LLaVA's."""

    def _scanned(self, file: str) -> Iterator[Sequence[int]]:
        return self._in_blocks(elements(file))

    def _read(self, file: str, *place: int) -> list[Row | ValueError]:
        if (size := place[1] - place[0]) > MOST_BLOCK_BYTES:
            return [too_large(size)]
        data, end = bytes_of(file, *place), 0
        found, text = [], data.decode("latin-1")  # one to one, so that places in it are places in the file
        while end < len(text):
            first = _next(text, end)
            end = _end(text, first)
            found.append(json_row(data[first:end]))
        return found


def json_row(data: bytes) -> Row | ValueError:
    """The row that some JSON holds, or what is wrong with it."""
    if len(data) > MOST_ROW_BYTES:
        return too_large(len(data))
    try:
        row = json.loads(data.decode("utf-8-sig"))
        return row if isinstance(row, dict) else ValueError(f"It is a {type(row).__name__}, not an object with keys.")
    except UnicodeDecodeError as error:
        return ValueError(
            f"It is not in UTF-8: its byte {error.start} is 0x{data[error.start]:02x}; convert the file."
        )
    except ValueError as error:
        return ValueError(f"It is no JSON: {error}")
    except RecursionError:
        return ValueError("It is nested too deeply to be read.")


def lines(file: str, chunk_bytes: int = 1 << 20) -> Iterator[tuple[int, int]]:
    """(first byte, byte after the last) of each line that holds something, with one chunk of it in memory."""
    end = 0
    with open(file, "rb") as text:
        while line := text.readline(chunk_bytes):
            first, end, is_blank = end, end + len(line), not line.strip()
            while line and not line.endswith(b"\n"):
                line = text.readline(chunk_bytes)
                end, is_blank = end + len(line), is_blank and not line.strip()
            if not is_blank:
                yield first, end


def elements(file: str, chunk_bytes: int = 1 << 24) -> Iterator[tuple[int, int]]:
    """(first byte, byte after the last) of each element of a JSON list, with one chunk of the file in memory;
    ValueError if it holds no list, or a broken one."""
    with open(file, encoding="latin-1", newline="") as text:
        buffer, before = text.read(chunk_bytes), 0
        place = _next(buffer, len(UTF8_MARK) if buffer.startswith(UTF8_MARK.decode("latin-1")) else 0)
        if buffer[place : place + 1] != "[":
            raise ValueError(f"{file} is no list of JSON objects in UTF-8: one object per line is called .jsonl.")
        place += 1
        while True:
            place = _next(buffer, place)
            if buffer[place : place + 1] == "]":
                return
            try:
                end = _end(buffer, place)
            except ValueError as error:
                if len(buffer) - place > MOST_BLOCK_BYTES:
                    raise ValueError(
                        f"{file} holds an element, at byte {before + place}, that is broken or larger than "
                        f"{MOST_BLOCK_BYTES >> 20} MB: mend it, or leave it out."
                    ) from None
                more = text.read(chunk_bytes)
                if not more:
                    raise ValueError(f"{file} is broken at byte {before + place}: {error}") from None
                before, buffer, place = before + place, buffer[place:] + more, 0
            else:
                yield before + place, before + end
                place = end


def _end(text: str, place: int) -> int:
    """Where an element ends, however deeply it is nested; ValueError if it is broken, or does not end."""
    try:
        return DECODER.raw_decode(text, place)[1]
    except RecursionError:
        depth = 0
        for mark in MARKS.finditer(text, place):
            depth += DEEPER.get(mark[0], 0)
            if depth == 0:
                return mark.end()
        raise ValueError("it does not end") from None


def _next(text: str, place: int) -> int:
    """Where the next element begins."""
    return SPACE.match(text, place).end()  # type: ignore[union-attr]
