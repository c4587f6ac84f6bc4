"""JSON Lines, and JSON files that hold one list.

A list is scanned once, and then read in parts, so places in the file are needed. Streaming JSON libraries do not give
them, and those that stand on yajl refuse the NaN that Python writes.
"""

import json
import re
from collections.abc import Iterator, Sequence

from vora.data.columns import Row
from vora.data.source import Source, bytes_of

SPACE = re.compile(r"[\s,]*")
DECODER = json.JSONDecoder()
UTF8_MARK = b"\xef\xbb\xbf"


class JsonLines(Source):
    """One JSON object per line."""

    def _scanned(self, file: str) -> Iterator[Sequence[int]]:
        return self._in_blocks(_lines(file))

    def _read(self, file: str, *place: int) -> list[Row | ValueError]:
        return [json_row(line) for line in bytes_of(file, *place).split(b"\n") if line.strip()]


class JsonArray(Source):
    """One JSON file that holds a list of objects, as LLaVA's."""

    def _scanned(self, file: str) -> Iterator[Sequence[int]]:
        return self._in_blocks(elements(file))

    def _read(self, file: str, *place: int) -> list[Row | ValueError]:
        data, end = bytes_of(file, *place), 0
        found, text = [], data.decode("latin-1")  # one to one, so that places in it are places in the file
        while end < len(text):
            first = _next(text, end)
            end = DECODER.raw_decode(text, first)[1]
            found.append(json_row(data[first:end]))
        return found


def json_row(data: bytes) -> Row | ValueError:
    """The row that some JSON holds, or what is wrong with it."""
    try:
        row = json.loads(data.decode("utf-8-sig"))
        return row if isinstance(row, dict) else ValueError(f"It is a {type(row).__name__}, not an object with keys.")
    except UnicodeDecodeError as error:
        return ValueError(
            f"It is not in UTF-8: its byte {error.start} is 0x{data[error.start]:02x}; convert the file."
        )
    except ValueError as error:
        return ValueError(f"It is no JSON: {error}")


def _lines(file: str) -> Iterator[tuple[int, int]]:
    """(first byte, byte after the last) of each line that holds something."""
    end = 0
    with open(file, "rb") as lines:
        for line in lines:
            first, end = end, end + len(line)
            if line.strip():
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
                end = DECODER.raw_decode(buffer, place)[1]
            except ValueError as error:
                more = text.read(chunk_bytes)
                if not more:
                    raise ValueError(f"{file} is broken at byte {before + place}: {error}") from None
                before, buffer, place = before + place, buffer[place:] + more, 0
            else:
                yield before + place, before + end
                place = end


def _next(text: str, place: int) -> int:
    """Where the next element begins."""
    return SPACE.match(text, place).end()  # type: ignore[union-attr]
