"""JSON Lines, and JSON files that hold one list.

A list is scanned once, and then read in parts, so places in the file are needed. Streaming JSON libraries do not give
them, and those that stand on yajl refuse the NaN that Python writes.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from vora.data.columns import Row
from vora.data.source import Source

SPACE = re.compile(r"[\s,]*")
UTF8_MARK = b"\xef\xbb\xbf"


class JsonLines(Source):
    """One JSON object per line."""

    def _scanned(self, file: str) -> Iterator[Sequence[int]]:
        start = place = count = 0
        with open(file, "rb") as lines:
            for line in lines:
                if line.strip():
                    count += 1
                place += len(line)
                if count == self.rows_per_block:
                    yield start, place, count
                    start, count = place, 0
        yield start, place, count

    def _read(self, file: str, *place: int) -> list[Row | ValueError]:
        return [json_row(line) for line in _bytes_of(file, *place).split(b"\n") if line.strip()]


class JsonArray(Source):
    """One JSON file that holds a list of objects, as LLaVA's."""

    def _scanned(self, file: str) -> Iterator[Sequence[int]]:
        start, count, end = 0, 0, 0
        for first, end in elements(file):
            start = first if count == 0 else start
            count += 1
            if count == self.rows_per_block:
                yield start, end, count
                count = 0
        if count:
            yield start, end, count

    def _read(self, file: str, *place: int) -> list[Row | ValueError]:
        data = _bytes_of(file, *place)
        try:
            return [_dict_or_error(row) for row in json.loads(f"[{data.decode()}]")]
        except UnicodeDecodeError:  # one row's fault
            text, end = data.decode("latin-1"), 0
            found = []
            while end < len(text):
                first, end = _element(text, _next(text, end))
                found.append(json_row(data[first:end]))
            return found


def json_row(data: bytes) -> Row | ValueError:
    """The row that some JSON holds, or what is wrong with it."""
    try:
        return _dict_or_error(json.loads(data.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        return ValueError(
            f"It is not in UTF-8: its byte {error.start} is 0x{data[error.start]:02x}; convert the file."
        )
    except ValueError as error:
        return ValueError(f"It is no JSON: {error}")


def elements(file: str, chunk_bytes: int = 1 << 24) -> Iterator[tuple[int, int]]:
    """(first byte, byte after the last) of each element of a JSON list, with one chunk of the file in memory.

    Bytes are decoded one to one, so that places in the text are places in the file.

    Raises:
        ValueError: the file holds no list, or a broken one.
    """
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
                _, end = _element(buffer, place)
            except ValueError as error:
                more = text.read(chunk_bytes)
                if not more:
                    raise ValueError(f"{file} is broken at byte {before + place}: {error}") from None
                before, buffer, place = before + place, buffer[place:] + more, 0
                continue
            yield before + place, before + end
            place = end


def _next(text: str, place: int) -> int:
    """Where the next element begins."""
    found = SPACE.match(text, place)
    return found.end() if found else place


def _element(text: str, place: int) -> tuple[int, int]:
    return place, json.JSONDecoder().raw_decode(text, place)[1]


def _bytes_of(file: str, start: int, end: int) -> bytes:
    with open(file, "rb") as text:
        text.seek(start)
        return text.read(end - start)


def _dict_or_error(row: Any) -> Row | ValueError:
    return row if isinstance(row, dict) else ValueError(f"It is a {type(row).__name__}, not an object with keys.")
