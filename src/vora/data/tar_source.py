"""WebDataset: tar shards in which files with one name are one sample."""

import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from vora.data.columns import IMAGE_COLUMNS, MOST_ROW_BYTES, TURN_COLUMNS, Row, too_large
from vora.data.images import IMAGE_ENDINGS, UNREAD_ENDINGS
from vora.data.json_source import json_row
from vora.data.source import Source, bytes_of
from vora.model.fetch_image import POLICY


class WebDataset(Source):
    """Tar shards; files with the same name up to its first dot are one sample. An image's ending (jpg, png, ...) makes
    it an image, `txt` its caption; the keys of `json` are columns."""

    def _scanned(self, file: str) -> Iterator[Sequence[int]]:
        return self._in_blocks(_samples(file))

    def _read(self, file: str, *place: int) -> list[Row | ValueError]:
        start, end = place
        with open(file, "rb") as content:
            content.seek(start)
            with tarfile.open(fileobj=content, mode="r:") as tar:
                members = filter(_belongs_to_a_sample, _members(tar, end))
                found = [(*_split_key(member.name), _content(tar, member)) for member in members]
        samples = groupby(found, key=lambda one: one[0])
        return [row_of_files(key, {ending: content for _, ending, content in files}) for key, files in samples]


def _samples(file: str) -> Iterator[tuple[int, int]]:
    """(first byte, byte after the last) of each sample of a tar file; ValueError if it is not whole."""
    start, end, last = 0, 0, None
    first_keys: set[str] = set()
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                setattr(tar, "members", [])  # it would remember all
                key = _split_key(member.name)[0]
                if _belongs_to_a_sample(member) and key != last:
                    if key in first_keys:
                        raise ValueError(
                            f"The files of sample {key} do not follow each other in {file}: pack it again with tar "
                            "--sort=name."
                        )
                    if len(first_keys) < 1000:
                        first_keys.add(key)
                    if last is not None:
                        yield start, end
                    start, last = end, key
                end = tar.offset  # of the next; a sparse file's size is not what it takes here
    except tarfile.TarError as error:
        raise ValueError(f"{file} is no whole tar file (compressed ones are to be unpacked): {error}") from None
    if end > Path(file).stat().st_size or bytes_of(file, end, end + 512) not in (b"", bytes(512)):
        raise ValueError(f"{file} is cut off in or after its last sample {last}: fetch or write it again.")
    if last is not None:
        yield start, end


def _members(tar: tarfile.TarFile, end: int) -> Iterator[tarfile.TarInfo]:
    """Those that begin before a byte; what comes after it is not read."""
    member = tar.next()
    while member is not None:
        yield member
        member = tar.next() if tar.offset < end else None


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | ValueError:
    """What a file of a sample holds, of what is not read nothing; a few kB may claim gigabytes, which is an error."""
    last = member.name.rpartition(".")[2].lower()
    most = POLICY.max_bytes if last in IMAGE_ENDINGS else MOST_ROW_BYTES
    if last not in (*IMAGE_ENDINGS, "txt", "json"):
        return b""
    if member.issparse():
        return ValueError(f"Its {last} is packed as a sparse file: pack it again without --sparse.")
    if member.size > most:
        return too_large(member.size, f"Its {last}", most)
    extract: Any = tar.extractfile  # never None of what belongs to a sample
    return extract(member).read()


def row_of_files(key: str, files: Mapping[str, bytes | ValueError]) -> Row | ValueError:
    """The row that {ending: content} of one sample make, images as people count, 2.png before 10.png; or what is wrong
    with it, or with one of them."""
    row: Row = {"id": key}
    images, unread, num_texts = [], [], 0
    for ending in sorted(files, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]):
        last, data = ending.rpartition(".")[2], files[ending]
        if isinstance(data, ValueError):
            return data
        if last in IMAGE_ENDINGS:
            images.append(data)
        elif last == "txt":
            num_texts += 1
            if num_texts > 1:
                return ValueError(
                    f"It has several texts, {ending} among them, for names up to their first dot are one sample: "
                    "write other dots of names as _."
                )
            try:
                row["text"] = data.decode().strip()  # beside an image, a caption
            except UnicodeDecodeError as error:
                return ValueError(f"Its {ending} is not in UTF-8: byte {error.start} is 0x{data[error.start]:02x}.")
        elif last == "json":
            values = json_row(data)
            if isinstance(values, ValueError):
                return values
            row |= values
        elif last in UNREAD_ENDINGS:
            unread.append(ending)
    if unread and not images and row.keys().isdisjoint({*IMAGE_COLUMNS, *TURN_COLUMNS}):
        return ValueError(
            f"It has no image, and its files {', '.join(unread)} are not read: known are txt, json and "
            f"{', '.join(IMAGE_ENDINGS)}."
        )
    if images:
        row = {name: value for name, value in row.items() if name not in IMAGE_COLUMNS} | {"images": images}
    return row


def _belongs_to_a_sample(member: tarfile.TarInfo) -> bool:
    return member.isfile() and not Path(member.name).name.startswith("._")  # macOS packs such beside each file


def _split_key(path: str) -> tuple[str, str]:
    """(name up to the first dot, ending)."""
    folder, slash, name = path.rpartition("/")
    stem, _, ending = name.partition(".")
    return folder + slash + stem, ending.lower()
